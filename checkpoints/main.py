"""`jblock convert`, also `jblock-convert`: fills a zoo with models, shows, checks and exports them."""

import argparse
import json
import os
import sys

from absl import app, logging

from checkpoints import arguments
from checkpoints.errors import BAD_INPUT
from jblock.command import program
from jblock.zoo.records import printable

# Commands that run on an accelerator where there is one.
_COMPUTE = {"compress", "quantize", "quantise", "measure", "equivalence", "stitch", "surrogate"}


def parser(name: str) -> argparse.ArgumentParser:
    """The command line, of a program called `name`."""
    return arguments.parser(name)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line of one command; exits with 2 when it is malformed."""
    return parser(_program(argv[0])).parse_args(argv[1:])


def _program(argv0: str) -> str:
    return program(argv0, "jblock-convert")


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
            f"{_program(sys.argv[0])}: interrupted: no model has changed; the same command again goes on",
            file=sys.stderr,
        )
        return 130
    except (*BAD_INPUT, OSError) as e:
        if args.json:
            print(json.dumps({"error": str(e)}))
        print(f"{_program(sys.argv[0])}: error: {printable(str(e))}", file=sys.stderr)
        return 2
    finally:
        logging.set_verbosity(verbosity)


def run() -> None:
    """Console entry point."""
    # "jblock convert COMMAND" or "jblock-convert COMMAND".
    words = [arg for arg in sys.argv[1:] if not arg.startswith("-")][:2]
    if _COMPUTE.isdisjoint(words):
        # What computes nothing should not wait for, or take, an accelerator.
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        # Beside a server on the same accelerator, take what is used and no more.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
