"""Attention over one contiguous sequence in float32: what every paged backend is held against."""

import math

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, start: int, sliding_window: int | None = None
) -> jax.Array:
    """Causal grouped-query attention of one sequence.

    Args:
      q: [q_len, heads, d], tokens at positions start, start + 1, ...
      k: [kv_len, kv_heads, d], every token so far, those of q included.
      v: [kv_len, kv_heads, d].
      start: position of the first query.
      sliding_window: tokens visible to a query, itself included; None sees all.

    Returns:
      [q_len, heads, d] float32.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    q_pos = start + jnp.arange(q.shape[0])[:, None]
    k_pos = jnp.arange(k.shape[0])[None, :]
    visible = k_pos <= q_pos
    if sliding_window is not None:
        visible &= k_pos > q_pos - sliding_window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)
