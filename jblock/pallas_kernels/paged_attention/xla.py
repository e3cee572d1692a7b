"""Paged attention in plain XLA: the backend that runs everywhere, laid out for CPU.

K pages are `[page, kv_head, d, token]` and V pages `[page, kv_head, token, d]`: with K transposed the
scores are a plain matmul over contiguous memory (measured ten times faster on CPU than `[token, d]`).
KV of 8 bits has scales `[page, kv_head, token]` beside each. Pages are walked one by one with an
online softmax (arXiv 2205.14135); gathering them into one array first costs several times more.

8-bit pages are widened as they are visited: scores take the scale of their K token, weights that of
their V token, so a page's values go into the matmul as they are. On CPU int8 reads a quarter of the
bytes and is up to twice as fast where the context is long.

bfloat16 is kept as its bits, uint16: XLA's CPU compiler widens the whole of an array of bfloat16 to
scatter into it or to gather from it (687 ms for a pool of 1 GB that float32 takes 0.4 ms for).
"""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.paged_attention.quantize import is_scaled, quantize
from jblock.pallas_kernels.paged_attention.ragged import Ragged

_MASKED = -1e30
JOINS_ROWS = True  # All rows are written before one is attended to.


def abstract_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(k, v) pages of one layer, or (k, v, k_scale, v_scale) if the dtype has scales."""
    stored = jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype
    k = jax.ShapeDtypeStruct((num_pages, num_kv_heads, head_dim, page_size), stored)
    v = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), stored)
    scale = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size), jnp.float32)
    return (k, v, scale, scale) if is_scaled(dtype) else (k, v)


def value_dtype(pages: jax.Array) -> jnp.dtype:
    """What the values of K or V pages are: a dtype of quantize.KV_DTYPES."""
    return jnp.dtype(jnp.bfloat16) if pages.dtype == jnp.uint16 else pages.dtype


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    *,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `api.paged_attention`. Rows of a packed batch are gathered into a grid and scattered back."""
    num_seqs, q_len = ragged.num_seqs, ragged.max_q_len
    grid = (num_seqs, q_len)
    if ragged.is_grid:
        q_grid, k_grid, v_grid = (a.reshape(*grid, *a.shape[1:]) for a in (q, k, v))
    else:
        row = ragged.row_starts[:, None] + jnp.arange(q_len, dtype=jnp.int32)
        q_grid, k_grid, v_grid = (a.at[row].get(mode="clip") for a in (q, k, v))
    kv_pages = _write(k_grid, v_grid, kv_pages, ragged)
    out = _attend(q_grid * scale, kv_pages, ragged, sliding_window, softcap).astype(q.dtype)
    if ragged.is_grid:
        return out.reshape(q.shape), kv_pages
    row = jnp.where(_valid(ragged), row, q.shape[0])  # padding goes to a row that does not exist
    return jnp.zeros_like(q).at[row].set(out, mode="drop"), kv_pages


def _positions(ragged: Ragged) -> jax.Array:
    """int32 [S, Q]."""
    new = jnp.arange(ragged.max_q_len, dtype=jnp.int32)
    return (ragged.kv_lens - ragged.q_lens)[:, None] + new


def _valid(ragged: Ragged) -> jax.Array:
    """bool [S, Q], False on padding."""
    return jnp.arange(ragged.max_q_len, dtype=jnp.int32) < ragged.q_lens[:, None]


def _write(
    k: jax.Array, v: jax.Array, kv_pages: tuple[jax.Array, ...], ragged: Ragged
) -> tuple[jax.Array, ...]:
    """Scatters new keys and values [S, Q, kv_heads, d] into their pages."""
    k_pages, v_pages, *scales = kv_pages
    num_pages, kv_heads, d, page_size = k_pages.shape
    positions = _positions(ragged)
    # Padding writes to a page that does not exist, which a scatter drops.
    page = jnp.take_along_axis(ragged.page_table, positions // page_size, axis=1, mode="clip")
    page = jnp.where(_valid(ragged), page, num_pages).reshape(-1)
    offset = (positions % page_size).reshape(-1)
    k, v = (a.reshape(-1, kv_heads, d) for a in (k, v))
    if scales:
        (k, k_scale), (v, v_scale) = quantize(k, k_pages.dtype), quantize(v, v_pages.dtype)
        scales = [
            pages.at[page, :, offset].set(rows, mode="drop")
            for pages, rows in zip(scales, (k_scale, v_scale), strict=True)
        ]
    k, v = _as_stored(k, k_pages), _as_stored(v, v_pages)
    k_pages = k_pages.at[page, :, :, offset].set(k, mode="drop")
    v_pages = v_pages.at[page, :, offset, :].set(v, mode="drop")
    return k_pages, v_pages, *scales


def _as_stored(rows: jax.Array, pages: jax.Array) -> jax.Array:
    rows = rows.astype(value_dtype(pages))
    return jax.lax.bitcast_convert_type(rows, pages.dtype)


def _read(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """The values of some pages, one a sequence."""
    return jax.lax.bitcast_convert_type(pages[ids], value_dtype(pages))


def _attend(
    q: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    sliding_window: int | None,
    softcap: float | None,
) -> jax.Array:
    """[S, Q, heads, d] float32 of scaled queries of that shape."""
    k_pages, v_pages, *scales = kv_pages
    _, kv_heads, d, page_size = k_pages.shape
    num_seqs, q_len, heads, _ = q.shape
    groups = heads // kv_heads
    starts = ragged.kv_lens - ragged.q_lens
    # By default TPUs and GPUs round float32 before they multiply.
    precision = jax.lax.Precision.HIGHEST if k_pages.dtype == jnp.float32 else None

    # q: (S, K, Q * G, d), so that a page's scores are one batched matmul.
    q = q.reshape(num_seqs, q_len, kv_heads, groups, d)
    q = q.transpose(0, 2, 1, 3, 4).reshape(num_seqs, kv_heads, q_len * groups, d)
    q_pos = jnp.repeat(_positions(ragged), groups, axis=1)[:, None, :, None]

    def visit(j, carry):
        best, total, acc = carry
        ids = jax.lax.dynamic_index_in_dim(ragged.page_table, j, axis=1, keepdims=False)
        k_page, v_page = _read(k_pages, ids), _read(v_pages, ids)  # (S, K, d, P), (S, K, P, d)
        if scales:
            k_page, v_page = k_page.astype(jnp.float32), v_page.astype(jnp.float32)
        scores = jnp.einsum(
            "skqd,skdp->skqp",
            q,
            k_page,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if scales:
            scores *= scales[0][ids][:, :, None, :]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        k_pos = (j * page_size + jnp.arange(page_size, dtype=jnp.int32))[None, None, None, :]
        visible = k_pos <= q_pos
        if sliding_window is not None:
            visible &= k_pos > q_pos - sliding_window
        scores = jnp.where(visible, scores, _MASKED)
        new_best = jnp.maximum(best, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_best), 0.0)
        keep = jnp.exp(best - new_best)
        total = total * keep + weights.sum(axis=-1, keepdims=True)
        if scales:
            weights *= scales[1][ids][:, :, None, :]
        acc = acc * keep + jnp.einsum(
            "skqp,skpd->skqd",
            weights,
            v_page,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_best, total, acc

    used = ragged.q_lens > 0
    last = jnp.max((jnp.where(used, ragged.kv_lens, 0) + page_size - 1) // page_size)
    first = jnp.int32(0)
    if sliding_window is not None:
        oldest = jnp.where(used, starts - sliding_window + 1, jnp.int32(2**30))
        first = jnp.maximum(jnp.min(oldest) // page_size, 0)
    shape = (num_seqs, kv_heads, q_len * groups)
    _, total, acc = jax.lax.fori_loop(
        first,
        last,
        visit,
        (
            jnp.full((*shape, 1), _MASKED, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
            jnp.zeros((*shape, d), jnp.float32),
        ),
    )
    out = acc / jnp.where(total > 0, total, 1.0)
    out = out.reshape(num_seqs, kv_heads, q_len, groups, d).transpose(0, 2, 1, 3, 4)
    return out.reshape(num_seqs, q_len, heads, d)
