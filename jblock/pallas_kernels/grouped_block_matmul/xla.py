"""Grouped block matmul in plain XLA: each variant goes over the blocks of rows that it has rows in.

`jax.lax.ragged_dot` wants the weights stacked, which would copy them, and where it has no kernel it
multiplies all rows by all weights.
"""

import jax
import jax.numpy as jnp

_BLOCK_ROWS = 32


def grouped_block_matmul(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
) -> jax.Array:
    """See `api.grouped_block_matmul`; nothing here depends on the device's kind."""
    rows, out = x.shape[0], weights[0].shape[0]
    size = min(rows, _BLOCK_ROWS)
    blocks = -(-rows // size)
    x = jnp.pad(x.astype(weights[0].dtype), ((0, blocks * size - rows), (0, 0)))
    y = jnp.zeros((blocks * size, out), jnp.float32)
    ends = jnp.cumsum(group_sizes)
    for v, w in enumerate(weights):
        begin, end = ends[v] - group_sizes[v], ends[v]

        def add(block: jax.Array, y: jax.Array, begin=begin, end=end, w=w) -> jax.Array:
            row = block * size + jnp.arange(size)[:, None]
            # Tied to the loop: a product that does not depend on it, where there is but one block, is made
            # before the loop, for variants without rows too.
            mine, _ = jax.lax.optimization_barrier(
                (jax.lax.dynamic_slice_in_dim(x, block * size, size), block)
            )
            product = jax.lax.dot_general(
                mine,
                w,
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            old = jax.lax.dynamic_slice_in_dim(y, block * size, size)
            new = jnp.where((row >= begin) & (row < end), product, old)
            return jax.lax.dynamic_update_slice_in_dim(y, new, block * size, axis=0)

        stop = jnp.where(end > begin, (end + size - 1) // size, 0)
        y = jax.lax.fori_loop(begin // size, stop, add, y)
    return y[:rows]
