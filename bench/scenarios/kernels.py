"""Each kernel alone on the present device: seconds, and the share of what copies and products reach."""

import argparse
import importlib
from typing import Any

import jax

from bench import timing
from bench.kernels import OPS, Case
from bench.report import progress, significant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This scenario's flags."""
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument(
        "--tune", action="store_true", help="search block sizes and keep them for this device"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`kernels {op: {case: ...}}`: `us` a call, `of_copy` the bytes that must move over what a copy of
    256 MB moves in that time, `of_matmul` the same of FLOPs and a square matmul; with --tune the best
    block sizes, and `tuned` names the file they went to or says that there is nothing to tune."""
    copied, matmul = timing.copy_rate(args.quick), timing.matmul_rate(args.quick)
    result: dict[str, Any] = {"kernels": {}, "tuned": {}}
    for name in [args.op] if args.op else OPS:
        op = importlib.import_module(f"bench.kernels.{name}")
        best: dict[Any, tuple[Any, float]] = {}
        lines = result["kernels"][name] = {"backend": op.backend()}
        for case in op.cases(args.quick):
            seconds = timing.seconds_of(case, None, args.quick)
            chosen = None
            for blocks in op.tunes(case) if args.tune else []:
                tried = _try(case, blocks, args.quick)
                if tried is not None and tried < best.get(case.shape, (None, seconds))[1]:
                    chosen, seconds = blocks, tried
                    best[case.shape] = blocks, tried
            lines[case.name] = {
                "us": round(seconds * 1e6, 1),
                "of_copy": significant(case.moved / seconds / copied),
                "of_matmul": significant(case.flops / seconds / matmul),
            }
            if chosen is not None:
                lines[case.name]["blocks"] = op.describe(chosen)
            progress(f"{name} {case.name}: {lines[case.name]}")
        if args.tune:
            result["tuned"][name] = (
                str(op.save(best)) if best else f"nothing to tune: backend {op.backend()}"
            )
    device = jax.devices()[0]
    return {
        **result,
        "device": device.device_kind,
        "copy_gb_s": round(copied / 1e9, 1),
        "matmul_gflops": round(matmul / 1e9, 1),
    }


def _try(case: Case, blocks: Any, quick: bool) -> float | None:
    """Seconds, or None where the compiler refuses the block sizes, for want of memory above all."""
    try:
        return timing.seconds_of(case, blocks, quick)
    except jax.errors.JaxRuntimeError as error:
        progress(f"{case.name} {blocks}: refused ({str(error).splitlines()[0][:100]})")
        return None
