"""The command line of `jblock convert`: its commands and their arguments. `texts.py` has what help tells."""

import argparse
from collections.abc import Callable

from absl.flags import argparse_flags

from checkpoints import commands, sources
from checkpoints.outcome import Outcome
from checkpoints.texts import ABOUT, ALIASES, FIELDS, MORE

Does = Callable[[argparse.Namespace], Outcome]


def parser(program: str) -> argparse.ArgumentParser:
    """The command line, of a program called `program` ("jblock convert")."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse_flags.ArgumentParser(
        prog=program, description=ABOUT.format(program=program), formatter_class=raw
    )
    # absl's flags stand in front of the command; other programs' may have names of a command's.
    subs = made.add_subparsers(
        required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    def command(name: str, does: Does, help: str, *fields: str) -> argparse.ArgumentParser:
        more, example = MORE[name]
        text = f"{help[0].upper()}{help[1:]}.\n\n{more}\n\nExample:\n  {program} {example}"
        aliases = ALIASES.get(name, ())
        sub = subs.add_parser(
            name, aliases=aliases, help=help, description=text, formatter_class=raw
        )
        sub.set_defaults(run=does)
        sub.add_argument("--zoo", required=True, help="folder of the zoo, or s3://bucket/folder")
        for field in fields:
            option = sub.add_argument(field, help=FIELDS[field])
            option.required = True
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            help="draw progress bars (default: when stderr is a terminal; else lines now and then)",
        )
        sub.add_argument("--quiet", action="store_true", help="say only results and errors")
        return sub

    _adding(command)
    _deriving(command)
    _showing(command)
    _keeping(command)
    return made


Command = Callable[..., argparse.ArgumentParser]


def _adding(command: Command) -> None:
    """Commands that add what others made."""

    def several(sub: argparse.ArgumentParser, src: str) -> None:
        sub.add_argument("src", nargs="+", help=FIELDS[src])
        sub.add_argument(
            "--name",
            action="append",
            help="name of a model, once for each source in their order (default: the source's own)",
        )
        sub.add_argument(
            "--dry_run", action="store_true", help="only tell what would be stored and shared"
        )
        _no_activate(sub)

    several(command("hf", sources.hf, "add Hugging Face checkpoints"), "src")
    several(command("gguf", sources.gguf, "add models from GGUF files"), "gguf")
    several(command("orbax", sources.orbax, "add checkpoints of JAX trainers"), "orbax")
    several(
        command("peft", sources.peft, "add adapters of PEFT or AdapterHub", "--base"), "adapter"
    )
    plan = command("plan", sources.plan, "tell what adding would store and share", "src")
    plan.add_argument("--name", help="name the model would get (default: the source's own)")
    plan.add_argument("--base", help=FIELDS["--base"])
    _details(plan)


def _deriving(command: Command) -> None:
    """Commands that make models of models."""
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
    _probe(compress)
    quantize = command("quantize", commands.quantize, "make a copy of a model in few bits", "name")
    quantize.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of a weight")
    quantize.add_argument("--group", type=int, default=64, help="inputs that share a scale")
    quantize.add_argument(
        "--name", dest="copy_name", help="name of the copy (default: NAME-int4, NAME-int8)"
    )
    _probe(quantize)
    measure = command("measure", commands.measure, "measure one model beside another", "name")
    measure.add_argument(
        "--against", dest="other", required=True, metavar="OTHER", help="model it is held against"
    )
    _probe(measure, text_required=True)
    _thresholds(measure)
    merge = command("merge", commands.merge, "add the weighted sum of LoRA adapters", "--name")
    _no_activate(merge)
    merge.add_argument(
        "--adapter",
        action="append",
        required=True,
        help="a model of the zoo and its weight, as A=0.7",
    )
    merge.add_argument("--combine", choices=("cat", "linear"), default="cat", help="see above")
    equal = command("equivalence", commands.equivalence, "find and measure what may replace what")
    equal.add_argument("names", nargs="*", help="models; default: all that are exact")
    equal.add_argument(
        "--cosine",
        type=float,
        default=0.9,
        help="smallest of a candidate's parameters (default: 0.9)",
    )
    _probe(equal)
    _thresholds(equal)
    equal.add_argument("--suffix", help="publish what is recommended as models of NAME + suffix")
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
    _training(stitch, 1000, 3e-3)
    small = command("surrogate", commands.surrogate, "make a smaller substitute for layers", "name")
    small.add_argument(
        "--layers", required=True, metavar="FIRST:LAST", help="LAST is the first to stay"
    )
    small.add_argument(
        "--name", "--as", dest="to", required=True, metavar="NAME", help="name of the new model"
    )
    small.add_argument(
        "--keep", type=float, default=0.5, help="share of the parameters at most (default: 0.5)"
    )
    small.add_argument("--train_items", help="task items to train on too")
    _training(small, 300, 2e-3)


def _showing(command: Command) -> None:
    """Commands that change nothing."""
    list_ = command("list", commands.list_, "list the models, or the edges")
    list_.add_argument("--edges", action="store_true", help="list edges in place of models")
    _thresholds(list_)
    inspect = command("inspect", commands.inspect, "show what a model is made of and shares")
    inspect.add_argument("name", nargs="?", help=FIELDS["name"])
    _details(inspect)
    command("diff", commands.diff, "compare two models component by component", "a", "b")
    command("verify", sources.verify, "compare a model with its source", "name", "--against")


def _keeping(command: Command) -> None:
    """Commands for the zoo as a whole."""
    export = command("export", commands.export, "write the files of a model", "name", "--out")
    export.add_argument(
        "--format",
        choices=("hf", "orbax"),
        default="hf",
        help="hf: the files it was made from, byte by byte; orbax: a checkpoint for Flax (default: hf)",
    )
    profile = command("profile", commands.profile, "measure what blocks take on this machine")
    profile.add_argument("names", nargs="*", help="models; default: all")
    profile.add_argument("--programs", help="folder of compiled programs (default: the user's own)")
    copy = command("copy", commands.copy, "copy models into another zoo", "--to")
    copy.add_argument("names", nargs="*", help="models, as name or name@version; default: all")
    _no_activate(copy)
    command("activate", commands.activate, "make a version the active one", "name")
    command("rollback", commands.rollback, "make the version active that was so before", "name")
    alias = command("alias", commands.alias, "give a version another name", "name")
    alias.add_argument("alias", help="letters, digits, '_', '.' and '-', a letter first")
    alias.add_argument("--remove", action="store_true", help="take the alias away")
    command("history", commands.history, "show what was done to a model, when and by whom", "name")
    rm = command("rm", commands.rm, "remove a model or an edge")
    rm.add_argument("name", nargs="?", help=FIELDS["name"])
    rm.add_argument("--edge", metavar="ID", help="an edge: the beginning of its id")
    gc = command("gc", commands.gc, "show, or remove, what nothing uses")
    gc.add_argument("--delete", action="store_true", help="remove it; without, only show it")
    fsck = command("fsck", commands.fsck, "check every hash and every reference")
    fsck.add_argument("--repair", action="store_true", help="put right what can be")


def _no_activate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--no_activate",
        action="store_true",
        help="add the version, and leave the active one as it is",
    )


def _details(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--details", action="store_true", help="also list every component, and every block"
    )


def _thresholds(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--policy",
        default="exact",
        choices=["exact", "near", "adaptive"],
        help="the widest policy whose edges may be used (default: exact, which is none)",
    )
    sub.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="MEASURE=WORST",
        help="the worst value accepted, e.g. kl=0.01 or accuracy_change=0.005 (of a change the size "
        "counts); one has to be on kl or accuracy_change; may be given several times",
    )


def _probe(sub: argparse.ArgumentParser, text_required: bool = False) -> None:
    sub.add_argument(
        "--text",
        required=text_required,
        help="held-out text to measure on, UTF-8; or .jsonl with a conversation (messages) a line, for "
        "models with a chat template",
    )
    sub.add_argument(
        "--items",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="task items to measure on, one JSON object a line with prompt (or messages, for the chat "
        "template) and answer (and stop: false where a model need not end there); for one model or for "
        "all; may be given several times",
    )
    sub.add_argument("--tokens", type=int, default=8192, help="of the text (default: 8192)")
    sub.add_argument("--row_tokens", type=int, default=512, help="of a row of text (default: 512)")
    sub.add_argument("--max_items", type=int, default=4000, help="of a task (default: 4000)")


def _training(sub: argparse.ArgumentParser, steps: int, rate: float) -> None:
    sub.add_argument("--train", required=True, help="text to train on, UTF-8")
    sub.add_argument("--steps", type=int, default=steps, help=f"of training (default: {steps})")
    sub.add_argument("--learning_rate", type=float, default=rate, help=f"default: {rate}")
    sub.add_argument("--batch_tokens", type=int, default=1024, help="of a step (default: 1024)")
    sub.add_argument("--seed", type=int, default=0, help="default: 0")
    _probe(sub, text_required=True)
