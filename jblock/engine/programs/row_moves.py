"""Rows that leave their registers for another agent, and rows that come from one."""

import jax

SIZES = tuple(2**i for i in range(16))
"""Rows of a call; what is left over is filled up."""


@jax.named_scope("take_rows")
def take_rows(registers: jax.Array, rows: jax.Array) -> jax.Array:
    """Copies rows out of their registers.

    Args:
      registers: float32 [num_rows, width] (not donated).
      rows: int32 [n]; rows past the end fill up.

    Returns:
      float32 [n, width].
    """
    return registers.at[rows].get(mode="clip")


@jax.named_scope("put_rows")
def put_rows(registers: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """Overwrites rows of registers.

    Args:
      registers: float32 [num_rows, width] (donated).
      values: float32 [n, width].
      rows: int32 [n]; rows past the end are dropped.
    """
    return registers.at[rows].set(values, mode="drop")


def size_for(count: int) -> int:
    """Rows of the call that moves so many."""
    return next(size for size in SIZES if size >= count)
