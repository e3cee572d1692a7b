"""Projections of few rows as the engine multiplies them, and by XLA alone: the ffn weights of the 250M
model, one layer after another, which is more than the caches hold."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels import Case
from bench.models import MODEL_250M, TINY
from jblock.blocks import linear
from jblock.blocks.platform import here
from jblock.cpu_kernels.matmul import api as matmul

ROWS = (1, 4, 8, 16, 24, 32, 64)


def backend() -> str:
    """What serves bfloat16 weights of few rows here."""
    probe = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return "cpu" if here().avx512 and matmul.serves(1, [probe]) else "xla"


def cases(quick: bool) -> list[Case]:
    """A decoding batch in either dtype by each."""
    rows = ROWS[:1] if quick else ROWS
    forms = {"": linear.matmul, " xla": linear.by_xla}
    return [
        _case(f"{dtype}{name}", form, count, quick)
        for dtype in ("bfloat16", "float32")
        for name, form in forms.items()
        for count in rows
    ]


def tunes(case: Case) -> list[Any]:
    """None of them has block sizes."""
    return []


def _case(name: str, form: Callable[..., jax.Array], rows: int, quick: bool) -> Case:
    shape = TINY if quick else MODEL_250M
    count = 3 * shape.layers * shape.hidden_size * shape.intermediate_size
    dtype = name.split()[0]
    return Case(
        name=f"ffn of {shape.layers} layers, {rows} rows, {name}",
        moved=count * jnp.dtype(dtype).itemsize,
        flops=2 * rows * count,
        make=functools.partial(_make, form, dtype, rows, shape),
        shape=None,
    )


def _make(form: Callable[..., jax.Array], dtype: str, rows: int, shape: Any) -> Any:
    wide, thin = (
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    )
    platform = here()

    def weight(size: tuple[int, int]) -> jax.Array:
        return jnp.full(size if platform.out_in else size[::-1], 0.01, dtype)

    weights = [(weight(wide), weight(wide), weight(thin)) for _ in range(shape.layers)]

    def call(x: jax.Array, weights: Any, blocks: Any = None) -> jax.Array:
        for gate, up, down in weights:
            inner = form(x, gate, platform) * form(x, up, platform)
            x = form(inner, down, platform) * 1e-3
        return x

    return [jnp.full((rows, shape.hidden_size), 0.01, jnp.float32), weights], call
