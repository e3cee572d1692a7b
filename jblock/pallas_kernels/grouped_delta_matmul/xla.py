"""Grouped delta matmul in plain XLA: item by item, a block of rows by a group in it, then piece by piece."""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.groups import items

_BLOCK_ROWS = 32


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
    """See `api.grouped_delta_matmul`; nothing here depends on the device's kind."""
    rows, size = x.shape[0], min(x.shape[0], _BLOCK_ROWS)
    padding = (0, -rows % size), (0, 0)
    x, y = jnp.pad(x.astype(a.dtype), padding), jnp.pad(y, padding)
    turns = jnp.sum(pieces > 0, axis=1)
    todo = items(group_sizes, rows, size, turns > 0)

    def dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dot_general(
            left.astype(right.dtype),
            right,
            (((1,), (axis,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def add_item(i: jax.Array, y: jax.Array) -> jax.Array:
        begin, group = todo.block[i] * size, todo.group[i]
        row = jnp.arange(size)[:, None]
        mine = (row >= todo.first[i]) & (row < todo.last[i])
        block = jax.lax.dynamic_slice_in_dim(x, begin, size)

        def add_piece(k: jax.Array, total: jax.Array) -> jax.Array:
            piece = pieces[group, k]
            return total + dot(dot(block, a[piece], 1), b[piece], 0)

        old = jax.lax.dynamic_slice_in_dim(y, begin, size)
        new = jnp.where(mine, jax.lax.fori_loop(0, turns[group], add_piece, old), old)
        return jax.lax.dynamic_update_slice_in_dim(y, new, begin, axis=0)

    return jax.lax.fori_loop(0, todo.count, add_item, y)[:rows]
