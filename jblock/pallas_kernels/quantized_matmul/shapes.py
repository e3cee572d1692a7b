"""Shapes of real models, for the compile matrix, the benchmarks and the traffic counts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import models
from jblock.pallas_kernels.models import Model
from jblock.pallas_kernels.quantized_matmul import api

MODELS = models.MODELS

ROWS = (16, 256)
"""A batch of decoding and a chunk of prefill."""

GROUP = 128


def batches(model: Model) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Projections, rows and bits of what the compile matrix has of a model, each shape once."""
    shapes: dict[tuple[int, int], str] = {}
    for projection, shape in model.projections.items():
        shapes.setdefault(shape, projection)
    for projection in shapes.values():
        for rows in ROWS:
            for bits in (8, 4):
                yield f"{projection} {rows} int{bits}", (projection, rows, bits)


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
    return functools.partial(api.quantized_matmul, backend=backend, **options), args


programs = functools.partial(models.programs, "quantized_matmul", program, batches)
"""(backend, models, **options): see `models.programs`."""


def needed(model: Model, projection: str, rows: int, bits: int) -> tuple[int, int]:
    """Bytes that must move (weights, scales, rows in bfloat16, results in float32) and FLOPs that must be
    done, whatever the kernel."""
    width, out = model.projections[projection]
    weights = out * width * bits // 8 + 4 * out * width // GROUP
    return weights + 2 * rows * width + 4 * rows * out, 2 * rows * width * out
