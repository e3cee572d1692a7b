"""Rows sorted into groups for the kernels that take several weights or deltas in one call.

Where a platform has such kernels they serve the blocks; the forms beside them, in `linear.py` and `moe.py`,
are what measured best on CPU.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jblock.blocks.platform import Platform
from jblock.blocks.rows import Rows
from jblock.pallas_kernels.backends import backend_of
from jblock.pallas_kernels.grouped_block_matmul.api import grouped_block_matmul
from jblock.pallas_kernels.grouped_delta_matmul.api import grouped_delta_matmul


def has_kernels(platform: Platform) -> bool:
    """Whether what is compiled for it goes through kernels."""
    return platform.name != "cpu" and backend_of(platform.name) != "xla"


def add_pairs(
    y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, pieces: jax.Array, rows: Rows
) -> jax.Array:
    """`y [T, out] + b @ (a @ x)` of each row's own pieces.

    Neighboring sequences of one slot are one group, so its pieces are read once; the engine sorts a
    batch by slots.

    Args:
      y: float32 [T, out].
      x: [T, in].
      a: [P, R, in].
      b: [P, R, out].
      pieces: int32 [slots, turns], 0 where a slot has no more.
      rows: of the batch; unused sequences get nothing.
    """
    slots, sizes = runs(jnp.where(rows.q_lens > 0, rows.slots, 0))
    return grouped_delta_matmul(
        y,
        x,
        a,
        b,
        pieces[slots],
        sizes * rows.q_len,
        backend=backend_of(rows.platform.name),
        device_kind=rows.platform.kind,
    )


def runs(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs of equal neighbors in int32 [S]: their values and lengths, int32 [S] each; behind the last run
    there are runs of no length."""
    begins = jnp.concatenate([jnp.ones(1, bool), values[1:] != values[:-1]])
    run = jnp.cumsum(begins) - 1
    member = run[None, :] == jnp.arange(values.size)[:, None]
    sizes = member.sum(axis=1, dtype=jnp.int32)
    return jnp.where(member, values[None, :], 0).max(axis=1), sizes


def multiply(
    x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array, platform: Platform
) -> jax.Array:
    """[T, in] @ the weight of each row's own group, [out, in] each -> float32 [T, out]; see
    `grouped_block_matmul`."""
    return grouped_block_matmul(
        x, weights, sizes, backend=backend_of(platform.name), device_kind=platform.kind
    )
