"""`jblock-client`: asks a server from the shell."""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from absl import app
from absl.flags import argparse_flags

from jblock.command import program
from serving.client import RESUME_SECONDS, Client
from serving.client_tls import TLS
from serving.values import Chunk, ClientError, Model

_KEY_VARIABLE = "JBLOCK_API_KEY"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 on a bad one."""
    return parser(program(argv[0], "jblock-client")).parse_args(argv[1:])


def parser(name: str) -> argparse.ArgumentParser:
    """The command line, of a program called `name`."""
    parser = argparse_flags.ArgumentParser(prog=name, description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", default="127.0.0.1:8470", help="host:port of the server")
    parser.add_argument("--timeout", type=float, help="seconds until a request is given up")
    parser.add_argument(
        "--resume_seconds",
        type=float,
        default=RESUME_SECONDS,
        help="seconds that answers wait for a server that ended to come back, and then go on; 0: not",
    )
    parser.add_argument(
        "--api_key_file", help=f"file with the API key; default: the environment's {_KEY_VARIABLE}"
    )
    parser.add_argument("--tls", action="store_true", help="connect with TLS")
    parser.add_argument("--tls_ca_file", help="authority of the server; default: the system's")
    parser.add_argument(
        "--tls_cert_file", help="certificate of this client, where one is asked for"
    )
    parser.add_argument("--tls_key_file", help="its private key")
    commands = parser.add_subparsers(
        parser_class=argparse.ArgumentParser, dest="command", required=True
    )
    generate = commands.add_parser("generate", help="ask a model")
    generate.add_argument("--model", required=True)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text; '-' reads standard input")
    prompt.add_argument("--prompt_file", help="file with the text")
    prompt.add_argument(
        "--prompts_file",
        help="file with a text a line, '-' reads standard input; prints a JSON line each",
    )
    prompt.add_argument("--token_ids", type=_ids, help="ids instead of text: 1,2,3")
    generate.add_argument("--stream", action="store_true", help="print text as it comes")
    generate.add_argument(
        "--json", action="store_true", help="print ids, usage and all, one JSON object a message"
    )
    for name, kind in _SAMPLING.items():
        generate.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    generate.add_argument("--stop", action="append", default=[], help="may be given several times")
    generate.add_argument("--stop_token_ids", type=_ids, default=[])
    generate.add_argument("--ignore_eos", action="store_true")
    generate.add_argument("--logprobs", action="store_true")
    generate.add_argument("--prompt_logprobs", action="store_true")
    generate.add_argument("--logit_bias", type=_biases, default={}, help="by id: 5=1.5,7=-100")
    chat = commands.add_parser("chat", help="talk with an instruct model")
    chat.add_argument("--model", required=True)
    chat.add_argument(
        "--prompt", help="ask once; '-' reads standard input; default: a conversation"
    )
    chat.add_argument("--prompt_file", help="ask once, with the text of a file")
    chat.add_argument("--system", help="what the model is told before")
    for name, kind in _SAMPLING.items():
        if name not in ("n", "top_logprobs"):
            chat.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    models = commands.add_parser("models", help="list the models, or show one")
    models.add_argument("name", nargs="?")
    load = commands.add_parser("load", help="serve a model of the zoo too, or its live version")
    load.add_argument("name")
    load.add_argument("--version", type=int, default=0, help="of the model; default: the live one")
    unload = commands.add_parser("unload", help="take no more requests for a model")
    unload.add_argument("name")
    commands.add_parser("health", help="whether the server serves")
    return parser


_SAMPLING: dict[str, type] = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "top_logprobs": int,
    "n": int,
    "priority": int,
    "policy": str,
    "max_damage": float,
}
_FLAGS = ("stop", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "logit_bias")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids such as 1,2,3") from error


def _biases(text: str) -> dict[int, float]:
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {int(token_id): float(value) for token_id, value in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 5=1.5,7=-100") from error


def main(args: argparse.Namespace) -> int:
    """Runs one command; returns the exit code: 0, or 2 when the server, or the input, says no."""
    commands = {
        "generate": _generate,
        "chat": _chat,
        "models": _models,
        "load": _load,
        "unload": _unload,
        "health": _health,
    }
    try:
        key = _key(args.api_key_file)
        options: Any = {"timeout": args.timeout, "resume_seconds": args.resume_seconds}
        with Client(args.target, key=key, tls=_tls(args), **options) as client:
            return commands[args.command](client, args)
    except (ClientError, ValueError, OSError) as error:
        print(f"jblock-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _tls(args: argparse.Namespace) -> bool | TLS:
    """How to connect; a file for TLS asks for it."""
    files = TLS(ca_file=args.tls_ca_file, cert_file=args.tls_cert_file, key_file=args.tls_key_file)
    return args.tls if files == TLS() else files


def _key(path: str | None) -> str | None:
    """The API key, without the newline that editors add."""
    if path is None:
        return os.environ.get(_KEY_VARIABLE) or None
    with open(path) as file:
        return file.read().strip()


def _generate(client: Client, args: argparse.Namespace) -> int:
    sampling: Any = {name: getattr(args, name) for name in _SAMPLING if hasattr(args, name)}
    sampling |= {name: getattr(args, name) for name in _FLAGS}
    if args.prompts_file is not None:
        return _generate_each(client, args, sampling)
    text = _text(args)
    prompt = args.token_ids if text is None else text
    if isinstance(prompt, str):
        _note(client, args.model)
    if args.stream and sampling.get("n", 1) > 1 and not args.json:
        raise ValueError(
            "--stream: the texts of several samples would mix; add --json, or leave it"
        )
    if args.stream:
        for chunk in client.stream(args.model, prompt, **sampling):
            _show(chunk, args.json, end="")
        if not args.json:
            print()
    else:
        _show(client.generate(args.model, prompt, **sampling), args.json, end="\n")
    return 0


def _generate_each(client: Client, args: argparse.Namespace, sampling: Any) -> int:
    """One answer to each line of a file."""
    with open(args.prompts_file) if args.prompts_file != "-" else sys.stdin as file:
        for line in file:
            if prompt := line.rstrip("\n"):
                _show(client.generate(args.model, prompt, **sampling), True, end="\n")
    return 0


def _text(args: argparse.Namespace) -> str | None:
    """The prompt that is a text: of the command line, a file, or standard input."""
    if args.prompt_file is not None:
        with open(args.prompt_file) as file:
            return file.read()
    return sys.stdin.read() if args.prompt == "-" else args.prompt


def _note(client: Client, model: str) -> None:
    """Says so where a text goes to a model that expects a chat."""
    try:
        expects_chat = client.model(model).has_chat_template
    except ClientError:
        return  # The request itself will say what is wrong.
    if expects_chat:
        print(
            f"jblock-client: {model} is an instruct model; `jblock-client chat` asks it as it was trained",
            file=sys.stderr,
        )


def _chat(client: Client, args: argparse.Namespace) -> int:
    sampling: Any = {name: getattr(args, name) for name in _SAMPLING if hasattr(args, name)}
    messages: list[dict[str, Any]] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    prompt = _text(args)
    alone = prompt is not None
    while True:
        if prompt is None:
            try:
                prompt = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return 0
        if prompt.strip():
            messages.append({"role": "user", "content": prompt})
            messages.append(_say(client, args.model, messages, sampling))
        if alone:
            return 0
        prompt = None


def _say(
    client: Client, model: str, messages: list[dict[str, Any]], sampling: Any
) -> dict[str, Any]:
    """Prints what the model says next, as it comes; the message that it is."""
    texts = []
    for chunk in client.chat_stream(model, messages, **sampling):
        print(chunk.text, end="", flush=True)
        texts.append(chunk.text)
    print()
    return {"role": "assistant", "content": "".join(texts)}


def _show(chunk: Chunk, as_json: bool, end: str) -> None:
    """Text, or everything, ids too, as JSON."""
    if as_json:
        print(json.dumps(dataclasses.asdict(chunk), ensure_ascii=False), flush=True)
    else:
        for choice in chunk.choices or (chunk,):
            print(choice.text, end=end, flush=True)


def _models(client: Client, args: argparse.Namespace) -> int:
    if args.name:
        for name, value in dataclasses.asdict(client.model(args.name)).items():
            print(f"{name}: {value}")
        return 0
    for model in client.models():
        _print_model(model)
    return 0


def _load(client: Client, args: argparse.Namespace) -> int:
    _print_model(client.load(args.name, args.version))
    return 0


def _unload(client: Client, args: argparse.Namespace) -> int:
    client.unload(args.name)
    return 0


def _print_model(model: Model) -> None:
    shared = f"{model.shared_blocks} of {model.blocks} blocks shared"
    on = f", on {model.base}" if model.base else ""
    print(f"{model.name}@{model.version}: {model.family}, {shared}{on}")


def _health(client: Client, args: argparse.Namespace) -> int:
    status = client.health()
    print(status)
    return 0 if status == "SERVING" else 2


def run() -> None:
    """Entry point of `jblock-client`."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
