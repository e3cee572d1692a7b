"""Each kernel alone on the present device: seconds, and the share of what copies and products reach."""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels import OPS, Case
from bench.report import progress


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
    copied, matmul = _copy_rate(args.quick), _matmul_rate(args.quick)
    result: dict[str, Any] = {"kernels": {}, "tuned": {}}
    for name in [args.op] if args.op else OPS:
        op = importlib.import_module(f"bench.kernels.{name}")
        best: dict[Any, tuple[Any, float]] = {}
        lines = result["kernels"][name] = {"backend": op.backend()}
        for case in op.cases(args.quick):
            seconds = _seconds(case, None, args.quick)
            chosen = None
            for blocks in op.tunes(case) if args.tune else []:
                tried = _try(case, blocks, args.quick)
                if tried is not None and tried < best.get(case.shape, (None, seconds))[1]:
                    chosen, seconds = blocks, tried
                    best[case.shape] = blocks, tried
            lines[case.name] = {
                "us": round(seconds * 1e6, 1),
                "of_copy": round(case.moved / seconds / copied, 3),
                "of_matmul": round(case.flops / seconds / matmul, 3),
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
        return _seconds(case, blocks, quick)
    except jax.errors.JaxRuntimeError as error:
        progress(f"{case.name} {blocks}: refused ({str(error).splitlines()[0][:100]})")
        return None


def _seconds(case: Case, blocks: Any, quick: bool) -> float:
    """Median seconds of a call."""
    args, fn = case.make()
    program = jax.jit(
        lambda *a: fn(*a, blocks), donate_argnums=() if case.donated is None else case.donated
    )

    def call():
        if case.donated is None:
            return program(*args)
        out, args[case.donated] = program(*args)
        return out

    return _median(call, quick)


def _copy_rate(quick: bool) -> float:
    """Bytes read and written a second by a copy."""
    x = jnp.ones((2**20 if quick else 2**26,), jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * x.nbytes / _median(lambda: copy(x), quick)


def _matmul_rate(quick: bool) -> float:
    """FLOPs a second of a square matmul: float32 on CPU, bfloat16 elsewhere."""
    cpu = jax.default_backend() == "cpu"
    n = 256 if quick else 1024 if cpu else 8192
    x = jnp.ones((n, n), jnp.float32 if cpu else jnp.bfloat16)
    matmul = jax.jit(lambda a: a @ a)
    return 2 * n**3 / _median(lambda: matmul(x), quick)


def _median(call: Callable[[], Any], quick: bool) -> float:
    """Median seconds of calls run one after the other, after one to compile."""
    jax.block_until_ready(call())
    times = []
    for _ in range(3 if quick else 20):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
