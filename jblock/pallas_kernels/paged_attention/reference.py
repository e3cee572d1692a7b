"""Attention over one contiguous sequence in float32: what every paged backend is held against."""

import numpy as np
from numpy.typing import ArrayLike


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    start: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Causal grouped-query attention of one sequence, in numpy.

    Args:
      q: [q_len, heads, d], tokens at positions start, start + 1, ...
      k: [kv_len, kv_heads, d], every token so far, those of q included.
      v: [kv_len, kv_heads, d].
      start: position of the first query.
      sliding_window: tokens visible to a query, itself included; None sees all.
      softcap: scores become softcap * tanh(scores / softcap); None: they stay.
      scale: factor of the scores; None: 1 / sqrt(d).

    Returns:
      [q_len, heads, d] float32.
    """
    q, k, v = (np.asarray(a, np.float32).swapaxes(0, 1) for a in (q, k, v))  # (H, T, d)
    groups = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    scores = q @ k.swapaxes(1, 2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    q_pos = start + np.arange(q.shape[1])[:, None]
    k_pos = np.arange(k.shape[1])[None, :]
    visible = k_pos <= q_pos
    if sliding_window is not None:
        visible &= k_pos > q_pos - sliding_window
    scores = np.where(visible, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1)
