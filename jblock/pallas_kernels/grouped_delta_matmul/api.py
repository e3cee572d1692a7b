"""Grouped delta matmul: each run of rows gets the low-rank delta of its own adapter, in one call.

Adapters of all ranks lie in one pair of tables of pieces of R ranks; a group of rows names its adapter's
pieces. What a row's base projection gave is taken and returned, so that the deltas are added in place.

A backend is a module with `grouped_delta_matmul` of the signature below, less `backend`.
"""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import backends


def grouped_delta_matmul(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pieces: jax.Array,
    group_sizes: jax.Array,
    *,
    backend: str | None = None,
    device_kind: str | None = None,
) -> jax.Array:
    """`y + sum_k (x @ a[p_k].T) @ b[p_k]` over the pieces p_k of the row's own group.

    Products are in the tables' dtype, sums in float32; in bfloat16 `x @ a.T` is rounded to it. A row of the
    result depends on its own rows of y and x and its own pieces alone, whatever the others hold.

    Args:
      y: float32 [T, out], what the base gave; updated in place where it is donated.
      x: [T, in]: first the rows of group 0, then those of group 1, and so on, then rows of none.
      a: [P, R, in], float32 or bfloat16.
      b: [P, R, out], of the same dtype; scales are folded in.
      pieces: int32 [G, K], the pieces of each group's adapter, then 0; all 0: it has none.
      group_sizes: int32 [G], rows of each; their sum is at most T.
      backend: one of backends.BACKENDS; None: the one for the platform jax computes on.
      device_kind: whose tuned block sizes to take; None: those of the first device.

    Returns:
      float32 [T, out].

    Raises:
      ValueError: shapes that do not fit together, or dtypes that are no use.
    """
    _check(y, x, a, b, pieces, group_sizes)
    module = backends.module("grouped_delta_matmul", backend)
    return module.grouped_delta_matmul(y, x, a, b, pieces, group_sizes, device_kind=device_kind)


def _check(
    y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, pieces: jax.Array, sizes: jax.Array
) -> None:
    fits = x.ndim == y.ndim == 2 and a.ndim == b.ndim == 3 and x.shape[0] == y.shape[0]
    if (
        not fits
        or a.shape[2] != x.shape[1]
        or b.shape[2] != y.shape[1]
        or a.shape[:2] != b.shape[:2]
    ):
        raise ValueError(
            f"y {y.shape}, x {x.shape}, a {a.shape} and b {b.shape} do not fit: want [T, out], "
            "[T, in], [P, R, in] and [P, R, out]"
        )
    if a.dtype != b.dtype or a.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"a and b have dtypes {a.dtype.name}, {b.dtype.name}; give twice float32 or bfloat16"
        )
    if y.dtype != jnp.float32:
        raise ValueError(f"y has dtype {y.dtype.name}; give float32")
    if pieces.ndim != 2 or sizes.shape != pieces.shape[:1]:
        raise ValueError(
            f"pieces {pieces.shape} and group_sizes {sizes.shape} do not fit: want [G, K], [G]"
        )
