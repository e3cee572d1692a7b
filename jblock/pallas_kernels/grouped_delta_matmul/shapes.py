"""Shapes of real models, for the compile matrix, the benchmarks and the traffic counts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import models
from jblock.pallas_kernels.grouped_delta_matmul import api
from jblock.pallas_kernels.models import Model

MODELS = models.MODELS

RANK = 8
"""Of a piece."""

BATCHES = {"decode": (64, 32), "prefill": (2048, 4)}
"""Rows and groups of a batch."""

TURNS = 8
"""Most pieces of an adapter: rank 64."""

PIECES = 257


def batches(model: Model) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Projections, rows and groups of what the compile matrix has of a model."""
    for projection in ("k", "up", "down"):
        for name, batch in BATCHES.items():
            yield f"{projection} {name}", (projection, *batch)


def program(
    backend: str, model: Model, projection: str, rows: int, groups: int, **options: Any
) -> tuple[Callable, tuple]:
    """One of `programs`: the function and its abstract arguments."""
    width, out = model.projections[projection]
    args = (
        jax.ShapeDtypeStruct((rows, out), jnp.float32),
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((PIECES, RANK, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((PIECES, RANK, out), jnp.bfloat16),
        jax.ShapeDtypeStruct((groups, TURNS), jnp.int32),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    return functools.partial(api.grouped_delta_matmul, backend=backend, **options), args


programs = functools.partial(models.programs, "grouped_delta_matmul", program, batches)
"""(backend, models, **options): see `models.programs`."""


def needed(
    model: Model, projection: str, sizes: Sequence[int], counts: Sequence[int]
) -> tuple[int, int]:
    """The least a batch costs, whatever the kernel.

    Args:
      model: the shape.
      projection: of it.
      sizes: rows of each group.
      counts: pieces of each group's adapter.

    Returns:
      bytes that must move (each group's pieces, its rows of x in bfloat16, of y in float32 read and
      written, where it has an adapter) and FLOPs that must be done.
    """
    width, out = model.projections[projection]
    live = [(n, c) for n, c in zip(sizes, counts, strict=True) if n and c]
    moved = sum(2 * c * RANK * (width + out) + n * (2 * width + 8 * out) for n, c in live)
    return moved, sum(2 * n * c * RANK * (width + out) for n, c in live)
