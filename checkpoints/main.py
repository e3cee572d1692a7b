"""Fills a zoo with models, shows what they share, checks it, and gives them back.

A zoo is a folder that keeps every part of every model once. Begin with

  jblock-convert hf CHECKPOINT --zoo ZOO --name NAME
  jblock-convert inspect --zoo ZOO

`jblock-convert COMMAND --help` tells more. With --json a command prints one JSON object and nothing
else on stdout. Exit codes: 0 done, 1 `verify` or `fsck` found something, 2 bad input (no model of the
zoo has changed).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

from absl import app, logging
from absl.flags import argparse_flags

from checkpoints import commands
from checkpoints.errors import BAD_INPUT


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line of one command; exits with 2 when it is malformed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse_flags.ArgumentParser(
        prog="jblock-convert", description=__doc__, formatter_class=raw
    )
    # absl's flags stand in front of the command; other programs' may have names of a command's.
    subs = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    def command(
        name: str, does: Callable[[argparse.Namespace], commands.Outcome], help: str, *fields: str
    ):
        more, example = _MORE[name]
        text = f"{help[0].upper()}{help[1:]}.\n\n{more}\n\nExample:\n  jblock-convert {example}"
        aliases = _ALIASES.get(name, ())
        sub = subs.add_parser(
            name, aliases=aliases, help=help, description=text, formatter_class=raw
        )
        sub.set_defaults(run=does)
        sub.add_argument("--zoo", required=True, help="folder of the zoo")
        for field in fields:
            option = sub.add_argument(field, help=_FIELDS[field])
            option.required = True
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            help="draw progress bars (default: when stderr is a terminal)",
        )
        sub.add_argument("--quiet", action="store_true", help="say only results and errors")
        return sub

    def thresholds(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--policy",
            default="adaptive",
            choices=["exact", "near", "adaptive"],
            help="the widest policy whose edges may be used (default: adaptive)",
        )
        sub.add_argument(
            "--threshold",
            action="append",
            default=[],
            metavar="MEASURE=WORST",
            help="the worst value accepted, e.g. kl=0.01 or top1_agreement=0.99; one of them has to be "
            "of outputs; may be given several times",
        )

    command("hf", commands.hf, "add a Hugging Face checkpoint", "src", "--name")
    compress = command(
        "compress",
        commands.compress,
        "keep a fine-tune as small deltas on its base",
        "name",
        "--base",
    )
    compress.add_argument(
        "--budget",
        type=float,
        required=True,
        help="bytes of the deltas, as a share of those of the changed components",
    )
    compress.add_argument(
        "--codec",
        action="append",
        choices=("low_rank", "bits"),
        help="which codecs may be used; may be given several times (default: all)",
    )
    compress.add_argument("--name", dest="copy_name", help="name of the copy (default: NAME-small)")
    quantize = command("quantize", commands.quantize, "make a copy of a model in few bits", "name")
    quantize.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of a weight")
    quantize.add_argument("--group", type=int, default=64, help="inputs that share a scale")
    quantize.add_argument(
        "--name", dest="copy_name", help="name of the copy (default: NAME-int4, NAME-int8)"
    )
    command(
        "peft", commands.peft, "add an adapter of PEFT or AdapterHub", "src", "--base", "--name"
    )
    merge = command("merge", commands.merge, "add the weighted sum of LoRA adapters", "--name")
    merge.add_argument(
        "--adapter",
        action="append",
        required=True,
        help="a model of the zoo and its weight, as A=0.7",
    )
    merge.add_argument("--combine", choices=("cat", "linear"), default="cat", help="see above")
    plan = command("plan", commands.plan, "tell what adding would store and share", "src", "--name")
    plan.add_argument("--base", help=_FIELDS["--base"])
    list_ = command("list", commands.list_, "list the models, or the edges")
    list_.add_argument("--edges", action="store_true", help="list edges in place of models")
    thresholds(list_)
    inspect = command("inspect", commands.inspect, "show components, who shares them, and bytes")
    inspect.add_argument("name", nargs="?", help=_FIELDS["name"])
    command("diff", commands.diff, "compare two models component by component", "a", "b")
    command("verify", commands.verify, "compare a model with its source", "name", "--against")
    command("export", commands.export, "write the files a model was made from", "name", "--out")

    def probe(sub: argparse.ArgumentParser, text_required: bool = False) -> None:
        sub.add_argument(
            "--text", required=text_required, help="held-out text to measure on, UTF-8"
        )
        sub.add_argument(
            "--items",
            action="append",
            default=[],
            metavar="[MODEL=]FILE",
            help="task items to measure on, one JSON object a line with prompt and answer (and stop: false "
            "where a model need not end there); for one model or for all; may be given several times",
        )
        sub.add_argument("--tokens", type=int, default=8192, help="of the text (default: 8192)")
        sub.add_argument("--max_items", type=int, default=4000, help="of a task (default: 4000)")

    equal = command("equivalence", commands.equivalence, "find and measure what may replace what")
    equal.add_argument("names", nargs="*", help="models; default: all that are exact")
    equal.add_argument(
        "--cosine",
        type=float,
        default=0.9,
        help="smallest of a candidate's parameters (default: 0.9)",
    )
    probe(equal)
    thresholds(equal)
    equal.add_argument("--suffix", help="publish what is recommended as models of NAME + suffix")

    def training(sub: argparse.ArgumentParser, steps: int, rate: float) -> None:
        sub.add_argument("--train", required=True, help="text to train on, UTF-8")
        sub.add_argument("--steps", type=int, default=steps, help=f"of training (default: {steps})")
        sub.add_argument("--learning_rate", type=float, default=rate, help=f"default: {rate}")
        sub.add_argument("--batch_tokens", type=int, default=1024, help="of a step (default: 1024)")
        sub.add_argument("--seed", type=int, default=0, help="default: 0")
        probe(sub, text_required=True)

    stitch = command(
        "stitch", commands.stitch, "join lower and upper layers of two models", "lower", "upper"
    )
    stitch.add_argument(
        "--at",
        action="append",
        required=True,
        metavar="K:J",
        help="K layers of LOWER under those of UPPER from J on; may be given several times",
    )
    stitch.add_argument(
        "--name", required=True, help="of the new model; with several joins NAME-K-J"
    )
    stitch.add_argument("--inner", type=int, help="inner width (default: that of UPPER)")
    training(stitch, 1000, 3e-3)
    small = command("surrogate", commands.surrogate, "make a smaller substitute for layers", "name")
    small.add_argument(
        "--layers", required=True, metavar="FIRST:LAST", help="LAST is the first to stay"
    )
    small.add_argument(
        "--as", dest="to", required=True, metavar="NAME", help="name of the new model"
    )
    small.add_argument(
        "--keep", type=float, default=0.5, help="share of the parameters at most (default: 0.5)"
    )
    small.add_argument("--train_items", help="task items to train on too")
    training(small, 300, 2e-3)
    profile = command("profile", commands.profile, "measure what blocks take on this machine")
    profile.add_argument("names", nargs="*", help="models; default: all")
    profile.add_argument("--programs", help="folder of compiled programs (default: the user's own)")
    copy = command("copy", commands.copy, "copy models into another zoo", "--to")
    copy.add_argument("names", nargs="*", help="models, as name or name@version; default: all")
    rm = command("rm", commands.rm, "remove a model or an edge")
    rm.add_argument("name", nargs="?", help=_FIELDS["name"])
    rm.add_argument("--edge", metavar="ID", help="an edge: the beginning of its id")
    gc = command("gc", commands.gc, "show, or remove, what nothing uses")
    gc.add_argument("--delete", action="store_true", help="remove it; without, only show it")
    fsck = command("fsck", commands.fsck, "check every hash and every reference")
    fsck.add_argument("--repair", action="store_true", help="put right what can be")
    return parser.parse_args(argv[1:])


_FIELDS = {
    "src": "folder with config.json (hf) or adapter_config.json (peft) and safetensors weights",
    "name": "a model in the zoo; where it makes sense also name@version",
    "a": "a model, as name or name@version",
    "b": "another model, or another version of the same",
    "lower": "the model that gives the lower layers",
    "upper": "the model that gives the upper layers, of the same tokenizer",
    "--name": "name the model gets in the zoo",
    "--base": "name of the model in the zoo that the adapter was trained on",
    "--against": "folder of the checkpoint or adapter",
    "--out": "folder to write, new or empty",
    "--to": "folder of the other zoo; made when absent",
}
# Other spellings a command is known by.
_ALIASES = {"quantize": ("quantise",)}
# Command -> what a newcomer should know, and an example.
_MORE = {
    "compress": (
        "Every changed attention, ffn and expert becomes the base's component and a delta: low rank in 8\n"
        "bits, or codes of 1, 2 or 4 bits; each gets the codec that buys most within the budget. Biases\n"
        "and norms are kept exactly. The copy has policy `near`; it shares the base's weights and matmuls.",
        "compress my-finetune --base llama --budget 0.125 --zoo ./zoo",
    ),
    "quantize": (
        "Attentions, ffns and experts get weights of 4 or 8 bits with a scale a group; norms, routers and\n"
        "both embeddings stay. The copy is a model of its own with policy `near`: it is served only where\n"
        "it is named, to requests that accept that. Edges tell how far each component is from its original.",
        "quantize llama --zoo ./zoo --bits 4 --group 64",
    ),
    "hf": (
        "The checkpoint is cut into components; those that the zoo has already are not stored again.\n"
        "Killed, it goes on where it was when it is called again. An equal checkpoint under the same\n"
        "name is no new version.",
        "hf ./llama-3.2-1b --zoo ./zoo --name llama",
    ),
    "peft": (
        "The adapter rides on the components of its base, which must be in the zoo and may be an adapter\n"
        "itself. LoRA, DoRA, (IA)3, biases, norms, whole modules, prompts and prefixes as PEFT saves them,\n"
        "bottlenecks as AdapterHub's library does (save_adapter with use_safetensors=True).",
        "peft ./my-adapter --zoo ./zoo --base llama --name my-llama",
    ),
    "merge": (
        "cat puts the adapters' ranks side by side, so that their weighted effects add up; linear adds\n"
        "their matrices instead, as PEFT does, for equal ranks. All must be on the same base.",
        "merge --zoo ./zoo --name both --adapter mine=0.7 --adapter yours=0.3",
    ),
    "plan": (
        "Writes nothing. Says for each component whether it would be stored or is shared, into which blocks\n"
        "the model would be cut, why there, and which models would be cut anew. With --base, for an adapter.",
        "plan ./my-finetune --zoo ./zoo --name mine",
    ),
    "list": (
        "`logical` is what separate checkpoints would take, `own` what only that model uses. With --edges:\n"
        "what was measured of substitutes, and which of them --policy and --threshold allow.",
        "list --edges --threshold top1_agreement=0.99 --zoo ./zoo",
    ),
    "inspect": (
        "Without a name: the whole zoo. Two models share a component when both are in `used by`.",
        "inspect my-llama --zoo ./zoo --json",
    ),
    "diff": (
        "Components are equal (stored once), changed (with the largest difference of two elements and\n"
        "the tensor that has it), or of another form.",
        "diff llama my-llama --zoo ./zoo",
    ),
    "verify": (
        "Reads both sides in full. Exit code 1 and one line for each difference.",
        "verify llama --against ./llama-3.2-1b --zoo ./zoo",
    ),
    "export": (
        "Weights, shards, index, config and tokenizer come back identical to the last byte; an adapter\n"
        "as a PEFT adapter, without its base.",
        "export llama@1 --out ./llama-again --zoo ./zoo",
    ),
    "profile": (
        "Runs every kind of block on the grids the engine decodes and prefills with, and keeps the times in\n"
        "the zoo. From then on blocks are cut by what a hand-over costs here. Give the machine some quiet.",
        "profile llama --zoo ./zoo",
    ),
    "copy": (
        "Only components the other zoo lacks are sent; an adapter takes its base along. Interrupted, it\n"
        "goes on where it was when it is called again.",
        "copy my-llama --zoo ./zoo --to /mnt/other/zoo",
    ),
    "equivalence": (
        "Finds components with parameters that point the same way, without comparing all pairs. With --text\n"
        "each is put in the place of the other and measured from end to end; the scores become edges. What\n"
        "--policy and --threshold allow together is recommended; with --suffix as models of policy near.",
        "equivalence --text held-out.txt --items mine=items.jsonl --policy near \\\n"
        "    --threshold accuracy_change=-0.005 --zoo ./zoo",
    ),
    "stitch": (
        "Trains a small component between the frozen layers of both, on the text and on what the better of\n"
        "the two makes of it. Several --at give one stitch that is told how deep it stands, and a model for\n"
        "each. Policy adaptive: served only where named, to requests that accept it. Killed, it goes on\n"
        "when called again.",
        "stitch small large --at 2:2 --name joined --train train.txt --text held-out.txt --zoo ./zoo",
    ),
    "surrogate": (
        "Removes the least important heads and channels of some layers and trains what is left to give the\n"
        "model's own outputs. Policy adaptive, like stitch. Killed, it goes on when called again.",
        "surrogate mine --layers 4:6 --as mine-small --train train.txt --train_items train.jsonl \\\n"
        "    --text held-out.txt --items items.jsonl --zoo ./zoo",
    ),
    "rm": (
        "Refused while an adapter or an edge relies on it. The components stay until `gc --delete`. With\n"
        "--edge in place of a name it removes an edge.",
        "rm my-llama --zoo ./zoo",
    ),
    "gc": (
        "What no model (in any version), edge, running command or unfinished conversion of the last day\n"
        "names. Safe beside running converters.",
        "gc --zoo ./zoo --delete",
    ),
    "fsck": (
        "Exit code 1 and one line for each problem. --repair writes derived records anew and moves damaged\n"
        "components to damaged/, so that converting a model that uses them makes them again.",
        "fsck --zoo ./zoo --repair",
    ),
}


def main(args: argparse.Namespace) -> int:
    """Runs one command; returns its exit code."""
    # A full disk is told in one line; orbax would log a traceback of every thread before it.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        outcome = args.run(args)
        if args.json:
            print(json.dumps(outcome.data, indent=2))
        else:
            outcome.show()
        sys.stdout.flush()
        return outcome.code
    except BrokenPipeError:
        # The reader (`| head`) has what it wants; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "jblock-convert: interrupted: no model has changed; the same command again goes on",
            file=sys.stderr,
        )
        return 130
    except (*BAD_INPUT, OSError) as e:
        if args.json:
            print(json.dumps({"error": str(e)}))
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
