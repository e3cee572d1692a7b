"""Grouped delta matmul in float32: what every backend is held against."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def grouped_delta_matmul(
    y: ArrayLike,
    x: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    pieces: Sequence[Sequence[int]],
    group_sizes: Sequence[int],
) -> np.ndarray:
    """float32 [T, out]; arguments as in `api.grouped_delta_matmul`."""
    out = np.array(y, np.float32)
    x, a, b = (np.asarray(v, np.float32) for v in (x, a, b))
    begin = 0
    for mine, size in zip(pieces, group_sizes, strict=True):
        rows = slice(begin, begin + size)
        for p in mine:
            if p:
                out[rows] += x[rows] @ a[p].T @ b[p]
        begin += size
    return out
