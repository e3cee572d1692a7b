"""Weight-only quantized matmul: weights of 8 or 4 bits with a scale for each group of inputs.

A backend is a module with `quantized_matmul` of the signature below, less `backend`.
"""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import backends

DTYPES = ("int8", "int4", "uint8")
"""Of the weights; uint8 is two of 4 bits to a byte."""


def quantized_matmul(
    x: jax.Array,
    w_q: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    backend: str | None = None,
    device_kind: str | None = None,
) -> jax.Array:
    """`x @ w.T` with `w = (w_q - zeros) * scales`, a scale (and zero) for each group of neighboring inputs.

    Products are in x's dtype, sums in float32. A row of the result depends on its own row of x alone.

    Args:
      x: [T, in], float32 or bfloat16.
      w_q: [out, in], int8 or int4; or uint8 [out, in / 2], where byte j has the weight of input 2j in its low
        half and that of 2j + 1 in its high one, each a two's complement number. That is how CPUs are given
        4 bits, and the XLA backend alone takes it.
      scales: float32 [out, in / group].
      zeros: float32 [out, in / group], what w_q is where the weight is 0; None: 0.
      backend: one of BACKENDS; None: the one for the platform jax computes on.
      device_kind: whose tuned block sizes to take; None: those of the first device.

    Returns:
      float32 [T, out].

    Raises:
      ValueError: shapes that do not fit together, or dtypes that are no use.
    """
    _check(x, w_q, scales, zeros)
    module = backends.module("quantized_matmul", backend)
    return module.quantized_matmul(x, w_q, scales, zeros, device_kind=device_kind)


def _check(x: jax.Array, w_q: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> None:
    if w_q.dtype.name not in DTYPES:
        raise ValueError(f"w_q has dtype {w_q.dtype.name}; give one of {', '.join(DTYPES)}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x has dtype {x.dtype.name}; give float32 or bfloat16")
    fits = x.ndim == w_q.ndim == scales.ndim == 2
    if fits:
        width = w_q.shape[1] * (2 if w_q.dtype == jnp.uint8 else 1)
        groups = max(1, scales.shape[1])
        fits = x.shape[1] == width and scales.shape[0] == w_q.shape[0] and width % groups == 0
    if not fits:
        raise ValueError(
            f"x {x.shape}, w_q {w_q.shape} and scales {scales.shape} do not fit: want [T, in], "
            "[out, in] (uint8: [out, in / 2]) and [out, in / group], group a divisor of in"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros {zeros.shape} are not as scales {scales.shape}")
