"""Paged attention in plain XLA: the backend that runs everywhere, laid out for CPU.

K pages are `[page, kv_head, d, token]` and V pages `[page, kv_head, token, d]`: with K transposed the
scores are a plain matmul over contiguous memory (measured ten times faster on CPU than `[token, d]`).
Pages are walked one by one with an online softmax (arXiv 2205.14135); gathering them into one array
first costs several times more.

int8 pages are widened as they are visited: scores take the scale of their K token, weights that of
their V token, so a page's values go into the matmul as they are. On CPU that reads a quarter of the
bytes and is up to twice as fast where the context is long.
"""

import math

import jax
import jax.numpy as jnp

from jblock.blocks.rows import Rows

_MASKED = -1e30


def kv_shapes(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the K and the V page array of one layer."""
    return (
        (num_pages, num_kv_heads, head_dim, page_size),
        (num_pages, num_kv_heads, page_size, head_dim),
    )


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    page_table: jax.Array,
    rows: Rows,
    sliding_window: int | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `api.paged_attention`."""
    k_pages, v_pages, *scales = kv_pages
    num_pages, kv_heads, d, page_size = k_pages.shape
    num_seqs, q_len, heads, _ = q.shape
    groups = heads // kv_heads
    positions, valid = rows.positions, rows.valid

    # Padding writes to a page that does not exist, which a scatter drops.
    page = jnp.take_along_axis(page_table, positions // page_size, axis=1, mode="clip")
    page = jnp.where(valid, page, num_pages).reshape(-1)
    offset = (positions % page_size).reshape(-1)
    k_rows, v_rows = (a.reshape(num_seqs * q_len, kv_heads, d) for a in (k, v))
    if scales:
        k_rows, k_scale = quantise(k_rows)
        v_rows, v_scale = quantise(v_rows)
        scales = [
            pages.at[page, :, offset].set(new, mode="drop")
            for pages, new in zip(scales, (k_scale, v_scale), strict=True)
        ]
    k_rows, v_rows = k_rows.astype(k_pages.dtype), v_rows.astype(v_pages.dtype)
    k_pages = k_pages.at[page, :, :, offset].set(k_rows, mode="drop")
    v_pages = v_pages.at[page, :, offset, :].set(v_rows, mode="drop")

    # q: (S, K, Q * G, d), so that a page's scores are one batched matmul.
    q = (q * (1.0 / math.sqrt(d))).reshape(num_seqs, q_len, kv_heads, groups, d)
    q = q.transpose(0, 2, 1, 3, 4).reshape(num_seqs, kv_heads, q_len * groups, d)
    q_pos = jnp.repeat(positions, groups, axis=1)[:, None, :, None]

    def visit(j, carry):
        best, total, acc = carry
        ids = jax.lax.dynamic_index_in_dim(page_table, j, axis=1, keepdims=False)
        k_page, v_page = k_pages[ids], v_pages[ids]  # (S, K, d, P), (S, K, P, d)
        if scales:
            k_page, v_page = k_page.astype(jnp.float32), v_page.astype(jnp.float32)
        scores = jnp.einsum("skqd,skdp->skqp", q, k_page, preferred_element_type=jnp.float32)
        if scales:
            scores *= scales[0][ids][:, :, None, :]
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
            "skqp,skpd->skqd", weights, v_page, preferred_element_type=jnp.float32
        )
        return new_best, total, acc

    ends = jnp.where(rows.q_lens > 0, rows.starts + rows.q_lens, 0)
    last = jnp.max((ends + page_size - 1) // page_size)
    first = jnp.int32(0)
    if sliding_window is not None:
        oldest = jnp.where(rows.q_lens > 0, rows.starts - sliding_window + 1, jnp.int32(2**30))
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
    return out.reshape(num_seqs, q_len, heads, d), (k_pages, v_pages, *scales)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., d] float32 -> int8 [..., d] and its scales [...]: symmetric, the greatest magnitude at 127.

    NaN or Inf makes the scale so, and with it all that is read back.
    """
    scale = jnp.abs(x).max(axis=-1) / 127.0
    steps = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale
