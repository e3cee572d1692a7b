"""Weight-only quantized matmul in float32: what every backend is held against."""

import numpy as np
from numpy.typing import ArrayLike


def dequantized(w_q: ArrayLike, scales: ArrayLike, zeros: ArrayLike | None = None) -> np.ndarray:
    """float32 [out, in] from w_q [out, in] and scales and zeros [out, in / group]."""
    w, scales = np.asarray(w_q, np.float32), np.asarray(scales, np.float32)
    groups = w.reshape(*scales.shape, -1)
    if zeros is not None:
        groups = groups - np.asarray(zeros, np.float32)[..., None]
    return (groups * scales[..., None]).reshape(w.shape)


def quantized_matmul(
    x: ArrayLike, w_q: ArrayLike, scales: ArrayLike, zeros: ArrayLike | None = None
) -> np.ndarray:
    """float32 [T, out] from x [T, in]; the rest as in `dequantized`."""
    return np.asarray(x, np.float32) @ dequantized(w_q, scales, zeros).T
