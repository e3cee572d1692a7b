"""The grouped delta matmul as `python -m bench kernels` measures and tunes it."""

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
from jblock.pallas_kernels.grouped_delta_matmul import shapes
from jblock.pallas_kernels.grouped_delta_matmul.tpu import TUNING, Blocks, Shape
from jblock.pallas_kernels.models import MODELS, Model

OP = "grouped_delta_matmul"
_PIECES = 2  # of each adapter: rank 16


def backend() -> str:
    """What serves the platform jax computes on."""
    return module(OP).__name__.rpartition(".")[2]


def cases(quick: bool) -> list[Case]:
    """Decoding and prefill with adapters of rank 16 on projections of real models; on CPU of small ones."""
    small = [m for m in MODELS if m.name == "qwen3-0.6b"]
    if quick:
        return [case_of(MODELS[-1], "up", *shapes.BATCHES["decode"])]
    models = small if backend() == "xla" else MODELS[:-1]
    return [
        case_of(model, projection, *batch)
        for model in models
        for projection in ("up", "down")
        for batch in shapes.BATCHES.values()
    ]


def tunes(case: Case) -> list[Blocks]:
    """Block sizes worth trying; the XLA backend has none."""
    if backend() != "tpu":
        return []
    return [Blocks(rows=rows, pieces=n) for rows in (8, 16, 32, 64, 128) for n in (1, 2, 4, 8)]


def save(best: Mapping[Shape, tuple[Blocks, float]]) -> Path:
    """Writes the device's file of tuned blocks."""
    return TUNING.save(jax.devices()[0].device_kind, best)


def case_of(model: Model, projection: str, rows: int, groups: int, pieces: int = _PIECES) -> Case:
    """As many rows for each of `groups` adapters, which have `pieces` pieces each."""
    width, out = model.projections[projection]
    moved, flops = shapes.needed(model, projection, [rows // groups] * groups, [pieces] * groups)
    return Case(
        name=f"{model.name} {projection} {rows} rows {groups} adapters",
        moved=moved,
        flops=flops,
        make=functools.partial(_make, model, projection, rows, groups, pieces),
        shape=Shape(
            rows=1 << (rows - 1).bit_length(),
            groups=groups,
            width=width,
            out=out,
            rank=shapes.RANK,
            turns=shapes.TURNS,
            dtype="bfloat16",
        ),
        donated=0,
    )


def _make(
    model: Model, projection: str, rows: int, groups: int, count: int
) -> tuple[list[Any], Any]:
    _, args = shapes.program(backend(), model, projection, rows, groups)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(k, s.shape, s.dtype) / 64 for k, s in zip(keys, args[:4], strict=True)
    ]
    pieces = np.zeros(args[4].shape, np.int32)
    pieces[:, :count] = 1 + np.arange(groups * count).reshape(groups, -1)
    sizes = np.full(groups, rows // groups, np.int32)

    def call(y, x, a, b, pieces, sizes, blocks=None):
        options = {} if blocks is None else {"blocks": blocks}
        y = module(OP).grouped_delta_matmul(y, x, a, b, pieces, sizes, **options)
        return y[:1], y

    return [*arrays, jnp.asarray(pieces), jnp.asarray(sizes)], call


def describe(blocks: Any) -> dict[str, int]:
    """Block sizes as the report tells them."""
    return dataclasses.asdict(blocks)
