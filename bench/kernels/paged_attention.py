"""Ragged paged attention as `python -m bench kernels` measures and tunes it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels import Case
from jblock.pallas_kernels.paged_attention import api, shapes
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.tpu_blocks import TUNING, Blocks, Shape

_DECODE = (1, 4096)  # new tokens, tokens in all
_PREFILL = (2048, 2048)


def backend() -> str:
    """The backend for the platform jax computes on."""
    return api.backend_of()


def cases(quick: bool) -> list[Case]:
    """Decoding and prefill of real models; on CPU of the model the other scenarios serve."""
    small = shapes.Model(name="250m", heads=16, kv_heads=8, head_dim=64)
    demo = shapes.MODELS[-1]
    if quick:
        return [case_of(demo, 4, 1, 64, 16, "float32"), case_of(demo, 2, 16, 32, 16, "float32")]
    if backend() in ("xla", "cpu"):
        return [
            case_of(small, 32, new, 1024, 64, dtype)
            for dtype in ("float32", "int8")
            for new in (1, 128)
        ]
    return [
        case_of(model, 64 if new == 1 else 4, new, total, shapes.PAGE_SIZE, dtype)
        for model in shapes.MODELS[:-1]
        for dtype in shapes.DTYPES
        for new, total in (_DECODE, _PREFILL)
    ]


def tunes(case: Case) -> list[Blocks]:
    """Block sizes around the heuristic's; the backends of the CPU have none."""
    if backend() != "tpu":
        return []
    shape: Shape = case.shape
    groups = shape.heads // shape.kv_heads
    tiles = [1] if shape.max_q_len == 1 else [n for n in (16, 32, 64, 128) if n * groups <= 1024]
    tokens = (128, 256, 512, 1024, 2048)
    found = []
    for q_tokens in tiles:
        for q_tiles in (1,) if shape.max_q_len == 1 else (2, 4, 8):
            for block in tokens:
                for chunk in (c for c in tokens if c <= block):
                    pages = max(1, block // shape.page_size), max(1, chunk // shape.page_size)
                    blocks = Blocks(
                        q_tokens=q_tokens,
                        q_tiles=q_tiles,
                        kv_pages=pages[0],
                        chunk_pages=min(pages),
                        many_rows=q_tokens * groups >= 128,
                    )
                    if blocks not in found:
                        found.append(blocks)
    return found


def save(best: Mapping[Shape, tuple[Blocks, float]]) -> Path:
    """Writes the device's file of tuned blocks."""
    return TUNING.save(jax.devices()[0].device_kind, best)


def case_of(
    model: shapes.Model, num_seqs: int, new: int, total: int, page_size: int, dtype: str
) -> Case:
    """`num_seqs` sequences of `total` tokens, the last `new` of them computed."""
    sequences = ((total - new, new),) * num_seqs
    rows_dtype = "float32" if backend() in ("xla", "cpu") else "bfloat16"
    moved, flops = shapes.needed(model, sequences, dtype, jnp.dtype(rows_dtype).itemsize)
    shape = Shape(
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        page_size=page_size,
        kv_dtype=dtype,
        max_q_len=1 << (new - 1).bit_length(),
    )
    return Case(
        name=f"{model.name} {num_seqs}x{new} of {total} {dtype}",
        moved=moved,
        flops=flops,
        make=functools.partial(_make, model, num_seqs, new, total, page_size, dtype, rows_dtype),
        shape=shape,
        donated=3,
    )


def _make(
    model: shapes.Model,
    num_seqs: int,
    new: int,
    total: int,
    page_size: int,
    dtype: str,
    rows_dtype: str,
) -> tuple[list[Any], Any]:
    key = jax.random.key(0)
    max_pages = -(-total // page_size)
    num_pages = 1 + num_seqs * max_pages
    rows = [
        jax.random.normal(key, (num_seqs * new, heads, model.head_dim), rows_dtype)
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    ]
    arrays = api.abstract_pages(num_pages, page_size, model.kv_heads, model.head_dim, dtype=dtype)
    pages = tuple(jnp.ones(a.shape, a.dtype) for a in arrays)
    # Pages in random order, as an engine's are after a while.
    table = 1 + np.random.default_rng(0).permutation(num_pages - 1).astype(np.int32)
    ragged = Ragged.grid(
        jnp.full(num_seqs, total - new, jnp.int32),
        jnp.full(num_seqs, new, jnp.int32),
        jnp.asarray(table.reshape(num_seqs, max_pages)),
        new,
    )

    def call(q, k, v, pages, ragged, blocks=None):
        options = {} if blocks is None else {"blocks": blocks}
        return api.module().paged_attention(
            q,
            k,
            v,
            pages,
            ragged,
            sliding_window=model.window,
            softcap=model.softcap,
            scale=model.head_dim**-0.5,
            **options,
        )

    return [*rows, pages, ragged], call


def describe(blocks: Any) -> dict[str, int]:
    """Block sizes as the report tells them."""
    return dataclasses.asdict(blocks)
