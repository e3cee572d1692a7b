"""Each kernel's cycles, counted in what the real compilers emit for chips that are not here."""

import argparse
from typing import Any

from bench import cycles_tpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This scenario's flags."""
    parser.add_argument(
        "--only",
        choices=(*cycles_tpu.CHIP_NAMES, "h200"),
        action="append",
        help="only this chip; may be given again",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`cycles {tpu: {chip: figures}, h200: figures}`: see the parts. --quick: three kernels, and none of
    jax's."""
    chosen = args.only or (*cycles_tpu.CHIP_NAMES, "h200")
    chips = [chip for chip in chosen if chip in cycles_tpu.CHIP_NAMES]
    found: dict[str, Any] = {}
    if chips:
        found["tpu"] = cycles_tpu.run(chips, args.quick)
    if "h200" in chosen:
        from bench import cycles_gpu  # brings command-line flags of its own

        found["h200"] = cycles_gpu.run(args.quick)
    return {"cycles": found}
