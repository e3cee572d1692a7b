"""Seconds of calls on the present device, and the rates that kernels are held against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels import Case

_CALLS = 20
"""Sent to an accelerator together: one alone takes longer to send than many a kernel to run."""


def seconds_of(case: Case, blocks: Any, quick: bool) -> float:
    """Median seconds of a call of a case, with block sizes or with its backend's own."""
    args, fn = case.make()
    program = jax.jit(
        lambda *a: fn(*a, blocks), donate_argnums=() if case.donated is None else case.donated
    )

    def call():
        if case.donated is None:
            return program(*args)
        out, args[case.donated] = program(*args)
        return out

    return median_seconds(call, quick)


def copy_rate(quick: bool) -> float:
    """Bytes read and written a second by a copy of 256 MB."""
    x = jnp.ones((2**20 if quick else 2**26,), jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * x.nbytes / median_seconds(lambda: copy(x), quick)


def read_rate(quick: bool) -> float:
    """Bytes read a second by a sum over 1 GB."""
    x = jnp.ones((2**20 if quick else 2**28,), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / median_seconds(lambda: total(x), quick)


def matmul_rate(quick: bool) -> float:
    """FLOPs a second of a square matmul: float32 on CPU, bfloat16 elsewhere."""
    cpu = jax.default_backend() == "cpu"
    n = 256 if quick else 1024 if cpu else 8192
    x = jnp.ones((n, n), jnp.float32 if cpu else jnp.bfloat16)
    matmul = jax.jit(lambda a: a @ a)
    return 2 * n**3 / median_seconds(lambda: matmul(x), quick)


def median_seconds(call: Callable[[], Any], quick: bool) -> float:
    """Median seconds of a call, after one to compile: of single calls on CPU, of a share in a run of them
    elsewhere."""
    jax.block_until_ready(call())
    count = 1 if jax.default_backend() == "cpu" else _CALLS
    times = []
    for _ in range(3 if quick else 20):
        begin = time.perf_counter()
        for _ in range(count):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begin) / count)
    return statistics.median(times)
