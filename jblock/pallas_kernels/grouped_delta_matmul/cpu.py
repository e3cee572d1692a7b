"""Grouped delta matmul by `jblock/cpu_kernels`: the backend for CPU where llvmlite is installed."""

import jax
import jax.numpy as jnp

from jblock.cpu_kernels import targets
from jblock.pallas_kernels.grouped_delta_matmul import xla


def grouped_delta_matmul(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pieces: jax.Array,
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
) -> jax.Array:
    """See `api.grouped_delta_matmul`; tables that are not float32, or of odd widths, are XLA's."""
    rank, width = a.shape[1:]
    if width % 4 or y.shape[1] % 4 or rank > 8 or a.dtype != jnp.float32:
        return xla.grouped_delta_matmul(y, x, a, b, pieces, group_sizes, device_kind=device_kind)
    call = jax.ffi.ffi_call(
        targets.target("delta", rank, width, y.shape[1]),
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={0: 0},
    )
    return call(y, x.astype(jnp.float32), a, b, pieces, group_sizes)
