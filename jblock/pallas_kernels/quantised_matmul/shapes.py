"""Shapes of real models, for the compile matrix, the benchmarks and the traffic counts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.models import MODELS, Model
from jblock.pallas_kernels.quantised_matmul import api

ROWS = (16, 256)
"""A batch of decoding and a chunk of prefill."""

GROUP = 128


def programs(
    backend: str, models: tuple[Model, ...] = MODELS, **options: Any
) -> Iterator[tuple[str, Callable, tuple]]:
    """Every program the compile matrix holds a backend to.

    Args:
      backend: one of backends.BACKENDS.
      models: which.
      options: passed to the op, such as device_kind where no device is present.

    Yields:
      name, function, abstract arguments.
    """
    for model in models:
        seen = set()
        for projection, shape in model.projections.items():
            for rows in ROWS:
                for bits in (8, 4):
                    if (shape, rows, bits) in seen:
                        continue
                    seen.add((shape, rows, bits))
                    fn, args = program(backend, model, projection, rows, bits, **options)
                    yield f"quantised_matmul {model.name} {projection} {rows} int{bits}", fn, args


def program(
    backend: str, model: Model, projection: str, rows: int, bits: int, **options: Any
) -> tuple[Callable, tuple]:
    """One of `programs`: the function and its abstract arguments."""
    width, out = model.projections[projection]
    args = (
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((out, width), jnp.int8 if bits == 8 else jnp.int4),
        jax.ShapeDtypeStruct((out, width // min(GROUP, width)), jnp.float32),
    )
    return functools.partial(api.quantised_matmul, backend=backend, **options), args


def needed(model: Model, projection: str, rows: int, bits: int) -> tuple[int, int]:
    """Bytes that must move (weights, scales, rows in bfloat16, results in float32) and FLOPs that must be
    done, whatever the kernel."""
    width, out = model.projections[projection]
    weights = out * width * bits // 8 + 4 * out * width // GROUP
    return weights + 2 * rows * width + 4 * rows * out, 2 * rows * width * out
