"""Paged attention: one call writes a batch's new KV rows and attends over everything cached.

A backend is a module with `kv_shapes` and `paged_attention` of the signatures below. Each backend owns
the physical layout of its pages; nothing outside it may assume one.

A layer's pages are `(k, v)` in float32, or in int8 `(k, v, k_scale, v_scale)`: one float32 scale per
page, kv head and token, `[page, kv_head, token]` whatever the backend, the greatest magnitude of that
token's head over 127; a value is round(x / scale). Values and scales are written in the same call.
"""

import jax
import jax.numpy as jnp

from jblock.blocks.rows import Rows
from jblock.pallas_kernels.paged_attention import xla

BACKENDS = {"xla": xla}

KvPages = tuple[jax.Array, ...]


def kv_shapes(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, backend: str = "xla"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the K and V page arrays of one layer, page id first. Page 0 is the null page: always
    zeros, never written, named by the unused entries of a page table."""
    return BACKENDS[backend].kv_shapes(num_pages, page_size, num_kv_heads, head_dim)


def abstract_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: str = "float32",
    backend: str = "xla",
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the page arrays of one layer: K and V, and for int8 their scales."""
    shapes = kv_shapes(num_pages, page_size, num_kv_heads, head_dim, backend=backend)
    pages = tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)
    if dtype != "int8":
        return pages
    scale = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size), jnp.float32)
    return (*pages, scale, scale)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KvPages,
    page_table: jax.Array,
    rows: Rows,
    *,
    sliding_window: int | None = None,
    backend: str = "xla",
) -> tuple[jax.Array, KvPages]:
    """Causal grouped-query attention of a batch over its pages.

    A query at position p sees positions 0 .. p of its own sequence (p - sliding_window + 1 .. p with a
    window). Pages a sequence does not own cannot reach its output, whatever they hold: V pages must
    be finite where they are visited, which the engine ensures by zeroing a page when it changes hands.

    Args:
      q: [S, Q, heads, d] queries, rope applied, not scaled.
      k: [S, Q, kv_heads, d] new keys, rope applied.
      v: [S, Q, kv_heads, d] new values.
      kv_pages: the page arrays of this layer, as `abstract_pages` shapes them (donated by the caller).
      page_table: int32 [S, max_pages], physical page of each logical page, 0 where there is none.
      rows: which of the S x Q rows are real, and where their sequences start.
      sliding_window: tokens visible to a query, itself included; None sees all.
      backend: key of BACKENDS.

    Returns:
      [S, Q, heads, d] float32 (0 on padding rows or unspecified finite), and the updated pages.
    """
    return BACKENDS[backend].paged_attention(q, k, v, kv_pages, page_table, rows, sliding_window)
