"""The quantized matmul as `python -m bench kernels` measures and tunes it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels import Case
from jblock.blocks import quantize
from jblock.pallas_kernels.backends import module
from jblock.pallas_kernels.models import MODELS, Model
from jblock.pallas_kernels.quantized_matmul import shapes
from jblock.pallas_kernels.quantized_matmul.tpu import TUNING, Blocks, Shape

OP = "quantized_matmul"


def backend() -> str:
    """What serves the platform jax computes on."""
    return module(OP).__name__.rpartition(".")[2]


def cases(quick: bool) -> list[Case]:
    """Projections of real models; on CPU of one model of 8 billion parameters."""
    if quick:
        return [case_of(MODELS[-1], "up", shapes.ROWS[0], bits) for bits in (8, 4)]
    models = MODELS[:1] if backend() == "xla" else MODELS[:-1]
    sizes = shapes.ROWS if jax.default_backend() != "cpu" else (1, 8, 32, 256)
    return [
        case_of(model, projection, rows, bits)
        for model in models
        for projection in ("up", "down")
        for rows in sizes
        for bits in (8, 4)
    ]


def tunes(case: Case) -> list[Blocks]:
    """Block sizes worth trying; the XLA backend has none."""
    if backend() != "tpu":
        return []
    most = -(-case.shape.rows // 16) * 16
    return [
        Blocks(rows=rows, columns=columns)
        for rows in (16, 64, 128, 256, 512)
        if rows <= max(16, most)
        for columns in (128, 256, 512, 1024, 2048)
        if columns <= case.shape.out
    ]


def save(best: Mapping[Shape, tuple[Blocks, float]]) -> Path:
    """Writes the device's file of tuned blocks."""
    return TUNING.save(jax.devices()[0].device_kind, best)


def case_of(model: Model, projection: str, rows: int, bits: int) -> Case:
    """Rows by a projection of few bits."""
    width, out = model.projections[projection]
    moved, flops = shapes.needed(model, projection, rows, bits)
    return Case(
        name=f"{model.name} {projection} {rows} int{bits}",
        moved=moved,
        flops=flops,
        make=functools.partial(_make, model, projection, rows, bits),
        shape=Shape(
            rows=1 << (rows - 1).bit_length(),
            width=width,
            out=out,
            group=min(shapes.GROUP, width),
            bits=bits,
        ),
    )


def _make(model: Model, projection: str, rows: int, bits: int) -> tuple[list[Any], Any]:
    _, args = shapes.program(backend(), model, projection, rows, bits)
    x, w_q, scales = args
    keys = jax.random.split(jax.random.key(0), 2)
    half = 2 ** (bits - 1)
    weights = jax.random.randint(keys[1], w_q.shape, -half, half, jnp.int8).astype(w_q.dtype)
    dtype = x.dtype
    if jax.default_backend() == "cpu":  # as the engine has them there
        dtype = jnp.float32
        if bits == 4:
            weights = jnp.asarray(quantize.pack(np.asarray(weights).astype(np.int8)))

    def call(x, w_q, scales, blocks=None):
        options = {} if blocks is None else {"blocks": blocks}
        return module(OP).quantized_matmul(x, w_q, scales, None, **options)

    return [jax.random.normal(keys[0], x.shape, dtype), weights, jnp.ones(scales.shape)], call


def describe(blocks: Any) -> dict[str, int]:
    """Block sizes as the report tells them."""
    return dataclasses.asdict(blocks)
