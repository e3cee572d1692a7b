"""Each kernel's cycles, counted in what the real compilers emit for chips that are not here."""

import argparse
from typing import Any

from bench import cycles_tpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This scenario's flags."""
    parser.add_argument(
        "--only",
        choices=(*cycles_tpu.CHIP_NAMES,),
        action="append",
        help="only this chip; may be given again",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`cycles {tpu: {chip: figures}}`: see the parts. --quick: three kernels, and none of jax's."""
    chips = args.only or cycles_tpu.CHIP_NAMES
    return {"cycles": {"tpu": cycles_tpu.run(chips, args.quick)}}
