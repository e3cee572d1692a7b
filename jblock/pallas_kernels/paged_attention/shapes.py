"""Shapes of real models, for the compile matrix, the benchmarks and the traffic counts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.paged_attention import api
from jblock.pallas_kernels.paged_attention.ragged import Ragged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What attention needs to know of a model; fields as in AttentionSpec."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None


MODELS = (
    Model(name="llama-3-8b", heads=32, kv_heads=8, head_dim=128),
    Model(name="llama-3-70b", heads=64, kv_heads=8, head_dim=128),
    Model(name="qwen3-0.6b", heads=16, kv_heads=8, head_dim=128),
    Model(name="qwen3-32b", heads=64, kv_heads=8, head_dim=128),
    Model(name="gemma-3-27b-local", heads=32, kv_heads=16, head_dim=128, window=1024),
    Model(name="gemma-3-27b-global", heads=32, kv_heads=16, head_dim=128),
    Model(name="gemma-2-9b-local", heads=16, kv_heads=8, head_dim=256, window=4096, softcap=50.0),
    Model(name="mixtral-8x7b", heads=32, kv_heads=8, head_dim=128),
    Model(name="demo", heads=4, kv_heads=2, head_dim=32),
)
DISTINCT = tuple(
    m
    for i, m in enumerate(MODELS)
    if all(dataclasses.replace(m, name=other.name) != other for other in MODELS[:i])
)
"""MODELS without those that share a kernel with one before them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Sizes of a batch: decoding, a chunk of prefill, verification or a mix of all.

    Attributes:
      name: what it is.
      num_seqs: sequences.
      rows: T, of all of them.
      max_q_len: most new tokens of one.
      max_len: most tokens of one.
    """

    name: str
    num_seqs: int
    rows: int
    max_q_len: int
    max_len: int


BATCHES = (
    Batch(name="decode", num_seqs=64, rows=64, max_q_len=1, max_len=4096),
    Batch(name="verify", num_seqs=16, rows=64, max_q_len=4, max_len=4096),
    Batch(name="mixed", num_seqs=32, rows=2048, max_q_len=2048, max_len=8192),
)
DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
PAGE_SIZE = 128


def programs(
    backend: str,
    models: tuple[Model, ...] = MODELS,
    dtypes: tuple[str, ...] = DTYPES,
    **options,
) -> Iterator[tuple[str, Callable, tuple]]:
    """Every program the compile matrix holds a backend to.

    Args:
      backend: one of api.BACKENDS.
      models: which.
      dtypes: of the pages.
      options: passed to the backend, such as device_kind where no device is present.

    Yields:
      name, function, abstract arguments (of which argument 3, the pages, is to be donated).
    """
    for model in models:
        for batch in BATCHES:
            for dtype in dtypes:
                fn, args = program(backend, model, batch, dtype, **options)
                yield f"paged_attention {model.name} {batch.name} {dtype}", fn, args


def program(
    backend: str, model: Model, batch: Batch, dtype: str, **options
) -> tuple[Callable, tuple]:
    """One of `programs`: the function and its abstract arguments."""
    max_pages = -(-batch.max_len // PAGE_SIZE)
    num_pages = 1 + batch.num_seqs * max_pages

    def rows(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch.rows, heads, model.head_dim), jnp.bfloat16)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pages = api.abstract_pages(
        num_pages, PAGE_SIZE, model.kv_heads, model.head_dim, dtype=dtype, backend=backend
    )
    ragged = Ragged(
        row_starts=ints(batch.num_seqs),
        q_lens=ints(batch.num_seqs),
        kv_lens=ints(batch.num_seqs),
        page_table=ints(batch.num_seqs, max_pages),
        max_q_len=batch.max_q_len,
    )
    fn = functools.partial(
        api.module(backend).paged_attention,
        sliding_window=model.window,
        softcap=model.softcap,
        scale=model.head_dim**-0.5,
        **options,
    )
    return fn, (rows(model.heads), rows(model.kv_heads), rows(model.kv_heads), pages, ragged)


def needed(
    model: Model, sequences: Sequence[tuple[int, int]], dtype: str, row_bytes: int = 2
) -> tuple[int, int]:
    """The least a batch of (cached tokens, new tokens) costs, whatever the kernel.

    Args:
      model: the shape.
      sequences: the batch.
      dtype: of the pages.
      row_bytes: bytes of a value of q, k, v and the result.

    Returns:
      bytes that must move (every cached token that is visible read once a sequence, every new one
      read and written to its page, queries read, results written), and FLOPs that must be done (two
      products of every query with every key it sees).
    """
    item = jnp.dtype(dtype).itemsize
    token = 2 * model.kv_heads * (model.head_dim * item + (4 if item == 1 else 0))
    row = 2 * (model.heads + model.kv_heads) * model.head_dim * row_bytes
    window = model.window or 1 << 62
    moved = pairs = 0
    for cached, new in sequences:
        moved += min(cached, window - 1) * token + new * (token + row)
        pairs += sum(min(cached + i + 1, window) for i in range(new))
    return moved, 4 * model.heads * model.head_dim * pairs
