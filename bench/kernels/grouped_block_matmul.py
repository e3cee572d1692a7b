"""The grouped block matmul as `python -m bench kernels` measures and tunes it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels import Case
from jblock.pallas_kernels.backends import module
from jblock.pallas_kernels.grouped_block_matmul import shapes
from jblock.pallas_kernels.grouped_block_matmul.tpu import TUNING, Blocks, Shape
from jblock.pallas_kernels.models import MODELS, Model

OP = "grouped_block_matmul"


def backend() -> str:
    """What serves the platform jax computes on."""
    return module(OP).__name__.rpartition(".")[2]


def cases(quick: bool) -> list[Case]:
    """Experts and variants of real models; on CPU of small ones."""
    small = [m for m in MODELS if m.name in ("qwen3-0.6b", "demo")]
    if quick:
        return [case_of(MODELS[-1], "up", shapes.TOKENS[0])]
    models = small if backend() == "xla" else MODELS[:-1]
    return [case_of(model, "up", tokens) for model in models for tokens in shapes.TOKENS]


def tunes(case: Case) -> list[Blocks]:
    """Block sizes worth trying; the XLA backend has none."""
    if backend() != "tpu":
        return []
    return [
        Blocks(rows=rows, columns=columns)
        for rows in (16, 64, 128, 256, 512)
        for columns in (128, 256, 512, 1024)
        if columns <= case.shape.out
    ]


def save(best: Mapping[Shape, tuple[Blocks, float]]) -> Path:
    """Writes the device's file of tuned blocks."""
    return TUNING.save(jax.devices()[0].device_kind, best)


def _sizes(rows: int, variants: int) -> np.ndarray:
    """Rows of each variant: some have many, some none."""
    share = np.random.default_rng(0).dirichlet(np.ones(variants))
    sizes = np.floor(share * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return sizes


def case_of(model: Model, projection: str, tokens: int) -> Case:
    """Rows of all variants, some with many and some with none."""
    _, (x, weights, _) = shapes.program(backend(), model, projection, tokens)
    (rows, width), out = x.shape, weights[0].shape[0]
    moved, flops = shapes.needed(model, projection, rows, _sizes(rows, len(weights)).tolist())
    return Case(
        name=f"{model.name} {projection} {tokens} of {len(weights)}",
        moved=moved,
        flops=flops,
        make=functools.partial(_make, model, projection, tokens),
        shape=Shape(
            rows=1 << (rows - 1).bit_length(),
            variants=len(weights),
            width=width,
            out=out,
            dtype="bfloat16",
        ),
    )


def _make(model: Model, projection: str, tokens: int) -> tuple[list[Any], Any]:
    _, (x, weights, _) = shapes.program(backend(), model, projection, tokens)
    keys = jax.random.split(jax.random.key(0), 1 + len(weights))
    arrays = tuple(
        jax.random.normal(k, w.shape, w.dtype) for k, w in zip(keys[1:], weights, strict=True)
    )

    def call(x, weights, sizes, blocks=None):
        options = {} if blocks is None else {"blocks": blocks}
        return module(OP).grouped_block_matmul(x, weights, sizes, **options)

    sizes = jnp.asarray(_sizes(x.shape[0], len(weights)))
    return [jax.random.normal(keys[0], x.shape, x.dtype), arrays, sizes], call


def describe(blocks: Any) -> dict[str, int]:
    """Block sizes as the report tells them."""
    return dataclasses.asdict(blocks)
