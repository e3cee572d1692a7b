"""Shapes of real models, for the compile matrix, the benchmarks and the traffic counts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import models
from jblock.pallas_kernels.grouped_block_matmul import api
from jblock.pallas_kernels.models import Model

MODELS = models.MODELS

TOKENS = (64, 2048)
"""A batch of decoding and a chunk of prefill."""

VARIANTS = 8
"""Of a model that has no experts: full fine-tunes that differ in the layer."""


def batches(model: Model) -> Iterator[tuple[str, tuple[str, int]]]:
    """Projections and tokens of what the compile matrix has of a model."""
    for projection in ("up", "down") if model.experts else ("q", "up", "down"):
        for tokens in TOKENS:
            yield f"{projection} {tokens}", (projection, tokens)


def program(
    backend: str, model: Model, projection: str, tokens: int, **options: Any
) -> tuple[Callable, tuple]:
    """One of `programs`: the function and its abstract arguments. A token of a mixture is top_k rows."""
    width, out = model.projections[projection]
    variants = model.experts or VARIANTS
    args = (
        jax.ShapeDtypeStruct((tokens * (model.top_k or 1), width), jnp.bfloat16),
        (jax.ShapeDtypeStruct((out, width), jnp.bfloat16),) * variants,
        jax.ShapeDtypeStruct((variants,), jnp.int32),
    )
    return functools.partial(api.grouped_block_matmul, backend=backend, **options), args


programs = functools.partial(models.programs, "grouped_block_matmul", program, batches)
"""(backend, models, **options): see `models.programs`."""


def needed(model: Model, projection: str, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Bytes that must move (the weights of variants with rows, rows in bfloat16, results in float32) and
    FLOPs that must be done, whatever the kernel."""
    width, out = model.projections[projection]
    weights = 2 * width * out * sum(n > 0 for n in sizes)
    return weights + 2 * sum(sizes) * width + 4 * rows * out, 2 * sum(sizes) * width * out
