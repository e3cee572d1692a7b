"""`jblock-convert`: fills a zoo, shows what is in it, and checks it.

Exit codes: 0 done, 1 `verify` or `fsck` found something, 2 bad input (the zoo is unchanged).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, logging
from absl.flags import argparse_flags

from checkpoints.errors import BAD_INPUT
from checkpoints.progress import Progress


def _hf(args: argparse.Namespace) -> int:
    from checkpoints import hf

    chain, new = hf.convert(Path(args.src), Path(args.zoo), args.name, _progress(args))
    print(f"{chain.name}@{chain.version} {'added' if new else 'unchanged'}")
    return 0


def _peft(args: argparse.Namespace) -> int:
    from checkpoints import peft

    chain, new = peft.convert(Path(args.src), Path(args.zoo), args.base, args.name, _progress(args))
    print(f"{chain.name}@{chain.version} on {chain.base} {'added' if new else 'unchanged'}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from checkpoints import printing
    from jblock.zoo.inventory import inventory
    from jblock.zoo.store import Zoo

    printing.print_chains(inventory(Zoo.open(args.zoo)))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from jblock.zoo.inventory import inventory
    from jblock.zoo.store import Zoo

    data = inventory(Zoo.open(args.zoo), args.name)
    if args.json:
        print(json.dumps(data, indent=2))
        return 0
    from checkpoints import printing

    printing.print_components(data)
    printing.print_chains(data)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from checkpoints.verify import verify

    differences = verify(Path(args.zoo), args.name, Path(args.against), _progress(args))
    for line in differences:
        print(line)
    print(f"{args.name} {'differs from' if differences else 'is'} {args.against}")
    return 1 if differences else 0


def _export(args: argparse.Namespace) -> int:
    from checkpoints.export import export

    name, version = _name_and_version(args.name)
    files = export(Path(args.zoo), name, Path(args.out), _progress(args), version)
    print(f"{args.name} written to {args.out}: {len(files)} files")
    return 0


def _fsck(args: argparse.Namespace) -> int:
    from jblock.zoo.fsck import fsck
    from jblock.zoo.inventory import stored_bytes
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    with _progress(args).bar("checking", stored_bytes(zoo)) as advance:
        problems = fsck(zoo, advance)
    for line in problems:
        print(line)
    print(f"{zoo.path}: {f'{len(problems)} problems' if problems else 'clean'}")
    return 1 if problems else 0


def _name_and_version(text: str) -> tuple[str, int | None]:
    """ "name@version" or "name"."""
    name, at, version = text.partition("@")
    return (name, int(version)) if at and version.isdecimal() else (text, None)


def _progress(args: argparse.Namespace) -> Progress:
    return Progress(bars=args.progress, quiet=args.quiet)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line of one command; exits with 2 when it is malformed."""
    parser = argparse_flags.ArgumentParser(prog="jblock-convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, does: Callable[[argparse.Namespace], int], help: str, *fields: str):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=does)
        sub.add_argument("--zoo", required=True, help="folder of the zoo")
        for field in fields:
            option = sub.add_argument(field, help=_FIELDS[field])
            option.required = True
        sub.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            help="draw progress bars (default: when stderr is a terminal)",
        )
        sub.add_argument("--quiet", action="store_true", help="say only results and errors")
        return sub

    command("hf", _hf, "add a Hugging Face checkpoint", "src", "--name")
    command("peft", _peft, "add a PEFT LoRA adapter", "src", "--base", "--name")
    command("list", _list, "list the models")
    inspect = command("inspect", _inspect, "show components, who shares them, and bytes")
    inspect.add_argument("name", nargs="?", help=_FIELDS["name"])
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    command("verify", _verify, "compare a model with its source", "name", "--against")
    command("export", _export, "write a model as the files it was made from", "name", "--out")
    command("fsck", _fsck, "check every hash and every reference")
    return parser.parse_args(argv[1:])


_FIELDS = {
    "src": "folder with config.json (hf) or adapter_config.json (peft) and safetensors weights",
    "name": "name of a model in the zoo",
    "--name": "name the model gets in the zoo",
    "--base": "name of the model in the zoo that the adapter was trained on",
    "--out": "folder to write, new or empty",
    "--against": "folder of the checkpoint or adapter",
}


def main(args: argparse.Namespace) -> int:
    """Runs one command; returns its exit code."""
    # A full disk is told in one line; orbax would log a traceback of every thread before it.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) has what it wants; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("jblock-convert: interrupted: nothing was added", file=sys.stderr)
        return 130
    except (*BAD_INPUT, OSError) as e:
        print(f"jblock-convert: error: {e}", file=sys.stderr)
        return 2
    finally:
        logging.set_verbosity(verbosity)


def run() -> None:
    """Console entry point."""
    # The converter computes nothing; it should not wait for, or take, an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
