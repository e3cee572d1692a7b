"""`python -m bench SCENARIO [--quick] [--json FILE] [--plot FILE]`: one JSON line last on stdout."""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from absl import app
from absl.flags import argparse_flags

from jblock.command import program

# All but one measure the CPU, also beside a GPU, unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if sys.argv[1:2] == ["gpu"] else "cpu")


def parser(name: str) -> argparse.ArgumentParser:
    """The command line, of a program called `name`."""
    from bench.scenarios import SCENARIOS

    made = argparse_flags.ArgumentParser(
        prog=name, description="Measures the engine; docs/benchmarks.md says how."
    )
    commands = made.add_subparsers(
        parser_class=argparse.ArgumentParser, dest="scenario", required=True, metavar="SCENARIO"
    )
    for name, scenario in SCENARIOS.items():
        sub = commands.add_parser(name, help=scenario.summary, description=scenario.summary)
        sub.add_argument("--quick", action="store_true", help="a tiny model, some seconds")
        sub.add_argument("--json", type=Path, help="also write the JSON line to this file")
        sub.add_argument("--plot", type=Path, help="draw the figures to this file (extra: plot)")
        sub.add_argument(
            "--cache", type=Path, help="keep compiled programs here (default: for this run only)"
        )
        if scenario.add_arguments:
            scenario.add_arguments(sub)
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, program name first."""
    return parser(program(argv[0], "python -m bench")).parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs one scenario and prints its line."""
    from bench import plots, report
    from bench.scenarios import SCENARIOS

    if args.plot:
        plots.require(args.scenario)
    with contextlib.ExitStack() as stack:
        if args.cache is None:
            args.cache = Path(stack.enter_context(tempfile.TemporaryDirectory()), "programs")
        result = SCENARIOS[args.scenario].run(args)
    if args.plot:
        plots.draw(args.scenario, result, args.plot)
    line = report.line(args.scenario, args.quick, result)
    if args.json:
        args.json.write_text(line + "\n")
    sys.stdout.flush()
    print(line, flush=True)
    return 0


def run() -> None:
    """Entry point of `jblock bench`."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
