"""Grouped block matmul: rows of several variants of one weight in one call.

Variants are the same projection of several full fine-tunes, or of the experts of a mixture. Each is an
array of its own, as components are loaded: nothing is stacked or copied.

A backend is a module with `grouped_block_matmul` of the signature below, less `backend`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import backends


def grouped_block_matmul(
    x: jax.Array,
    weights: Sequence[jax.Array],
    group_sizes: jax.Array,
    *,
    backend: str | None = None,
    device_kind: str | None = None,
) -> jax.Array:
    """`x @ w.T` with w the weight of the row's own variant.

    Products are in the weights' dtype, sums in float32. A row of the result depends on its own row of x
    and its own variant alone, whatever the others hold.

    Args:
      x: [T, in]: first the rows of variant 0, then those of variant 1, and so on, then rows of none.
      weights: [out, in] each, all of one dtype, float32 or bfloat16.
      group_sizes: int32 [variants], rows of each; their sum is at most T.
      backend: one of backends.BACKENDS; None: the one for the platform jax computes on.
      device_kind: whose tuned block sizes to take; None: those of the first device.

    Returns:
      float32 [T, out]; zeros for rows of no variant.

    Raises:
      ValueError: shapes that do not fit together, or dtypes that are no use.
    """
    _check(x, weights, group_sizes)
    module = backends.module("grouped_block_matmul", backend)
    return module.grouped_block_matmul(x, tuple(weights), group_sizes, device_kind=device_kind)


def _check(x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array) -> None:
    if not weights:
        raise ValueError("weights is empty; give one array for each variant")
    if {(w.shape, w.dtype) for w in weights} != {(weights[0].shape, weights[0].dtype)}:
        raise ValueError("weights differ in shape or dtype; give variants of one weight")
    if weights[0].dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"weights have dtype {weights[0].dtype.name}; give float32 or bfloat16")
    if x.ndim != 2 or weights[0].ndim != 2 or x.shape[1] != weights[0].shape[1]:
        raise ValueError(
            f"x {x.shape} and weights {weights[0].shape} do not fit: want [T, in], [out, in]"
        )
    if group_sizes.shape != (len(weights),):
        raise ValueError(
            f"group_sizes {group_sizes.shape} is not one for each of {len(weights)} weights"
        )
