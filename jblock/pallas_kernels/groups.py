"""Rows sorted into groups, and the items that a kernel takes them in: a block of rows by a group in it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jblock.pallas_kernels.pieces import piece_bound, pieces


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("count", "block", "group", "first", "last"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """Items in the order of their rows.

    Attributes:
      count: int32 [], how many there are; entries behind mean nothing, but are in range.
      block: int32 [N], which block of rows.
      group: int32 [N], which group.
      first, last: int32 [N], its rows in the block are first .. last - 1.
    """

    count: jax.Array
    block: jax.Array
    group: jax.Array
    first: jax.Array
    last: jax.Array

    def changes(self, of: jax.Array) -> jax.Array:
        """int32 [N], 1 where an array [N] over the items has another value than for the item before."""
        return jnp.concatenate([jnp.ones(1, jnp.int32), (of[1:] != of[:-1]).astype(jnp.int32)])


def items(
    group_sizes: jax.Array, num_rows: int, block_rows: int, wanted: jax.Array | None = None
) -> Items:
    """Cuts groups at the edges of blocks of rows.

    Args:
      group_sizes: int32 [G], rows of each group, one behind the other from row 0.
      num_rows: T, at least their sum.
      block_rows: rows of a block.
      wanted: bool [G], groups that get items; None: all.
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    stops = ends if wanted is None else jnp.where(wanted, ends, begins)
    groups = group_sizes.shape[0]
    bound = piece_bound(groups, num_rows, num_rows, block_rows)
    group, block, count = pieces(begins, stops, block_rows, bound)
    start = block * block_rows
    return Items(
        count=count,
        block=jnp.clip(block, 0, (num_rows - 1) // block_rows),
        group=group,
        first=jnp.clip(begins[group] - start, 0, block_rows),
        last=jnp.clip(ends[group] - start, 0, block_rows),
    )


def choose(index: Any, count: int, act: Callable[[int], None], first: int = 0) -> None:
    """Inside a kernel: act(index), of which only the program at run time knows the number, found by
    halving first .. first + count - 1."""
    if count == 1:
        act(first)
        return
    half = count // 2

    @pl.when(index < first + half)
    def _low() -> None:
        choose(index, half, act, first)

    @pl.when(index >= first + half)
    def _high() -> None:
        choose(index, count - half, act, first + half)


def for_window(
    first: Any, last: Any, windows: Sequence[int], part: int, act: Callable[[Any, int], None]
) -> None:
    """Inside a kernel: act(begin, rows) once, for rows of a block of which first .. last - 1 are an item's:
    the least of `windows` that holds those; the last one is the block. So what lies at the edge of a group
    is multiplied once, and costs no more than a whole block. begin is a multiple of `part`."""
    begin, size = lax.div(first, part) * part, windows[-1]
    needed, below = last - begin, 0
    for rows in windows:

        @pl.when((needed > below) & (needed <= rows))
        def _act(rows: int = rows) -> None:
            if rows == size:
                act(0, size)
            else:
                act(pl.multiple_of(jnp.minimum(begin, (size - rows) // part * part), part), rows)

        below = rows


def doubling_windows(size: int, part: int) -> list[int]:
    """Powers of two of `part` rows under `size`, and that: few programs, which multiply up to twice what is
    needed."""
    return [part << i for i in range((-(-size // part) - 1).bit_length())] + [size]


def even_windows(size: int, part: int) -> list[int]:
    """Each number of parts up to half of `size`, then steps of an eighth: no more is multiplied for nothing,
    by twelve programs for sixteen parts."""
    step = -(-size // (8 * part)) * part
    few = list(range(part, size // 2 + 1, part))
    first = step * (few[-1] // step + 1) if few else step
    return sorted({*few, *range(first, size, step), size})
