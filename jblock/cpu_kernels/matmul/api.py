"""Projections of few rows in machine code of our own; see `kernel`.

bfloat16 weights take AMX or AVX-512 BF16, float32 ones AVX-512.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jblock.cpu_kernels import targets

_MOST_BYTES = 1 << 20
"""Of x as float32: it is laid on the stack of a thread."""

_disabled: list[bool] = []
"""Not empty after `disable`."""


def disable() -> None:
    """Leaves all products to XLA from now on, in this process."""
    _disabled.append(True)


def serves(count: int, weights: Sequence[jax.Array]) -> bool:
    """Whether `matmul` has code for so many rows of x and such weights [out, in] on this machine."""
    if _disabled or not targets.available():
        return False
    from jblock.cpu_kernels.matmul import items, kernel

    first = weights[0]
    return (
        count in kernel.rows_served(str(first.dtype))
        and 4 * (-(-count // 16) * 16) * first.shape[1] <= _MOST_BYTES
        and all(w.dtype == first.dtype and w.shape[1] == first.shape[1] for w in weights)
        and all(size % items.UNIT == 0 for w in weights for size in w.shape)
    )


def matmul(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """`x [T, in] @ weight [out, in].T` for each: float32 [T, out]. x is rounded as the weights are."""
    count = x.shape[0]
    call = jax.ffi.ffi_call(
        targets.target("matmul", str(weights[0].dtype), count),
        [jax.ShapeDtypeStruct((count, w.shape[0]), jnp.float32) for w in weights],
    )
    return list(call(x.astype(jnp.float32), *weights))
