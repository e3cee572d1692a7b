"""bfloat16 projections of few rows on a CPU with AMX in machine code of our own; see `matmul_kernel`.

In float32 a kernel of the same kind was no faster than XLA's at 1 to 8 rows, and slower beyond.
"""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.native import targets


def serves(count: int, weight: jax.Array) -> bool:
    """Whether `matmul` has code for so many rows of x and such a weight [out, in] on this machine."""
    if not targets.available() or not targets.has_amx():
        return False
    from jblock.pallas_kernels.native import matmul_kernel as kernel

    return (
        weight.dtype == jnp.bfloat16
        and count <= kernel.MOST_ROWS
        and all(size % kernel.UNIT == 0 for size in weight.shape)
    )


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [T, in] @ weight [out, in].T`: float32 [T, out]. x is rounded to bfloat16 as the weight is."""
    call = jax.ffi.ffi_call(
        targets.target("matmul", x.shape[0]),
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32),
    )
    return call(x.astype(jnp.float32), weight)
