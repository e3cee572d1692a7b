"""Grouped block matmul in float32: what every backend is held against."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def grouped_block_matmul(
    x: ArrayLike, weights: Sequence[ArrayLike], group_sizes: Sequence[int]
) -> np.ndarray:
    """float32 [T, out] from x [T, in], weights [out, in] and the rows of each; zeros for rows of none."""
    x, ws = np.asarray(x, np.float32), [np.asarray(w, np.float32) for w in weights]
    out, begin = np.zeros((len(x), len(ws[0])), np.float32), 0
    for w, size in zip(ws, group_sizes, strict=True):
        out[begin : begin + size] = x[begin : begin + size] @ w.T
        begin += size
    return out
