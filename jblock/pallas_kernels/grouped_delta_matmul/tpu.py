"""Grouped delta matmul on TPU, in Pallas Mosaic: both products of a delta in one kernel.

Work is cut into items, a block of rows by a group with an adapter in it. An item brings its adapter's
pieces in runs of a few, the next run (of the next item, too) on its way while one is multiplied: rows of x
by all ranks of the run, and that at once by the other halves of the pieces, added to the block of y in
vector memory. Of a block only a window that holds the item's rows is multiplied, once. Blocks without any
adapter are neither read nor written: y is updated in place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.groups import doubling_windows, for_window, items
from jblock.pallas_kernels.refs import refs
from jblock.pallas_kernels.tuning import Tuning

LANES = 128
PART = 8
"""Rows that are multiplied at least: a register tile of float32."""

_VMEM_BYTES = 64 * 2**20
_MOST_COLUMNS = 2048  # of a product, which is beside its sum in registers and vector memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on.

    Attributes:
      rows: of x, rounded up to a power of two.
      groups: bound on them.
      width: inputs.
      out: columns of the result.
      rank: of a piece.
      turns: most pieces of an adapter.
      dtype: name of the tables'.
    """

    rows: int
    groups: int
    width: int
    out: int
    rank: int
    turns: int
    dtype: str

    @property
    def key(self) -> str:
        """How a tuned file names the shape."""
        return (
            f"{self.rows}x{self.width}x{self.out} groups {self.groups} "
            f"rank {self.rank}x{self.turns} {self.dtype}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel cuts its work: rows of an item at most, and pieces that are brought together."""

    rows: int
    pieces: int

    def __post_init__(self):
        if self.rows < PART or self.rows % PART or self.pieces < 1:
            raise ValueError(f"{self}: give rows a multiple of {PART}, pieces over 0")


def heuristic(shape: Shape) -> Blocks:
    """In decoding blocks of 8 rows, as a group has few. Else up to 128 rows, as many as leave y, in and out
    and twice each, in 24 MB; and pieces for 64 ranks, or what 4 MB hold."""
    item = 4 if shape.dtype == "float32" else 2
    rows = 128 if shape.rows >= 32 * shape.groups else PART
    rows = min(rows, 24 * 2**20 // (16 * shape.out + 2 * item * shape.width))
    ranks = min(64, 2**22 // (item * (shape.width + shape.out)))
    return Blocks(
        rows=max(PART, rows // PART * PART), pieces=max(1, min(shape.turns, ranks // shape.rank))
    )


TUNING = Tuning("grouped_delta_matmul", Blocks, heuristic)


@refs
class _Scalars:
    """Of N items, G groups and their pieces, in scalar memory: int32."""

    block: Any  # [N], of rows
    group: Any  # [N]
    first: Any  # [N], row of the block
    last: Any  # [N], behind its last row
    opens: Any  # [N], 1: it is the first of its block
    counts: Any  # [G], pieces of each group
    pieces: Any  # [G * turns], which ones


@refs
class _Scratch:
    """The kernel's buffers."""

    a: Any  # [2, run, R, in]
    b: Any  # [2, run, R, out]
    sems: Any  # DMA [2], of both
    begun: Any  # int32 [1] in SMEM: runs until now


def grouped_delta_matmul(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pieces: jax.Array,
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
    blocks: Blocks | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """See `api.grouped_delta_matmul`.

    Args beyond it:
      blocks: how to cut the work; None: as tuned for the device.
      interpret: as of pallas_call.
    """
    (rows, width), out, dtype = x.shape, y.shape[1], a.dtype
    (groups, turns), rank = pieces.shape, a.shape[1]
    if blocks is None:
        shape = Shape(
            rows=1 << (rows - 1).bit_length(),
            groups=groups,
            width=width,
            out=out,
            rank=rank,
            turns=turns,
            dtype=dtype.name,
        )
        blocks = TUNING.blocks_for(shape, device_kind)
    # A block is all rows or a multiple of a tile; the last one may stick out.
    padded = -(-rows // PART) * PART
    size = min(blocks.rows, padded)
    run = min(blocks.pieces, turns)
    padding = (0, padded - rows), (0, 0)
    counts = jnp.sum(pieces > 0, axis=1, dtype=jnp.int32)
    todo = items(group_sizes, rows, size, counts > 0)
    # Without any item there is one without rows, which leaves its block as it is.
    some = todo.count > 0
    last = jnp.where(some, todo.last, 0)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    y_block = pl.BlockSpec((size, out), lambda i, scalars: (scalars.block[i], 0))
    scalars = _Scalars(
        block=todo.block,
        group=todo.group,
        first=todo.first,
        last=last,
        opens=todo.changes(todo.block),
        counts=jnp.where(some, counts, 0),
        pieces=pieces.reshape(-1),
    )
    scratch: Any = _Scratch(
        a=pltpu.VMEM((2, run, rank, width), dtype),
        b=pltpu.VMEM((2, run, rank, out), dtype),
        sems=pltpu.SemaphoreType.DMA((2,)),
        begun=pltpu.SMEM((1,), jnp.int32),
    )
    return pl.pallas_call(
        functools.partial(_kernel, turns=turns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(todo.count, 1),),
            in_specs=[
                pl.BlockSpec((size, width), lambda i, scalars: (scalars.block[i], 0)),
                *(anywhere, anywhere, y_block),
            ],
            out_specs=y_block,
            scratch_shapes=[scratch],
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out), jnp.float32),
        input_output_aliases={len(jax.tree.leaves(scalars)) + 3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_delta_matmul",
    )(scalars, jnp.pad(x.astype(dtype), padding), a, b, jnp.pad(y, padding))[:rows]


def _kernel(
    items: _Scalars, x: Any, a: Any, b: Any, y: Any, out: Any, s: _Scratch, *, turns: int
) -> None:
    """One item: x [rows, in]; a [P, R, in], b [P, R, out] in HBM; y [rows, out] as read, out as written."""
    i = pl.program_id(0)
    run, rank, width = s.a.shape[1:]
    size, columns = out.shape

    def for_pieces(i: Any, r: Any, slot: Any, act: Any) -> Any:
        """Does `act` to the copies of run r of item i; returns how many pieces it has."""
        group = items.group[i]
        number = jnp.minimum(items.counts[group] - r * run, run)

        @pl.loop(0, number)
        def _piece(k: Any) -> None:
            piece = items.pieces[group * turns + r * run + k]
            for hbm, buffer in ((a, s.a), (b, s.b)):
                act(pltpu.make_async_copy(hbm.at[piece], buffer.at[slot, k], s.sems.at[slot]))

        return number

    @pl.when(i == 0)
    def _first() -> None:
        s.begun[0] = 0
        for_pieces(0, 0, 0, lambda copy: copy.start())

    @pl.when(items.opens[i] == 1)
    def _open() -> None:
        out[...] = y[...]

    def add(begin: Any, rows: int, slot: Any, used: int) -> None:
        part = pl.ds(begin, rows)
        inner = _dot(x[part], s.a[slot, :used].reshape(used * rank, width), 1)
        row = begin + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= items.first[i]) & (row < items.last[i])
        step = columns if columns % LANES else _dividing(columns)

        def add_columns(at: Any) -> None:
            wide = s.b[slot, :used, :, at].reshape(used * rank, step)
            added = _dot(inner.astype(wide.dtype), wide, 0)
            out[part, at] += jnp.where(mine, added, 0.0)

        for c in range(columns // step):
            add_columns(pl.ds(c * step, step))

    total = pl.cdiv(items.counts[items.group[i]], run)

    @pl.loop(0, total)
    def _run(r: Any) -> None:
        slot = lax.rem(s.begun[0], 2)
        s.begun[0] += 1

        @pl.when(r + 1 < total)
        def _bring_next_run() -> None:
            for_pieces(i, r + 1, 1 - slot, lambda copy: copy.start())

        @pl.when((r + 1 == total) & (i + 1 < pl.num_programs(0)))
        def _bring_next_item() -> None:
            for_pieces(i + 1, 0, 1 - slot, lambda copy: copy.start())

        number = for_pieces(i, r, slot, lambda copy: copy.wait())

        below = 0
        # A program for each power of two of pieces, so that few are not multiplied as many.
        for used in _sizes(run):

            @pl.when((number > below) & (number <= used))
            def _multiply(used: int = used) -> None:
                # Where no piece was brought lie another adapter's, whose NaN would be ours.
                @pl.loop(number, used)
                def _clear(k: Any) -> None:
                    s.a[slot, k] = jnp.zeros((rank, width), s.a.dtype)
                    s.b[slot, k] = jnp.zeros((rank, columns), s.b.dtype)

                for_window(
                    *(items.first[i], items.last[i], doubling_windows(size, PART), PART),
                    lambda at, rows: add(at, rows, slot, used),
                )

            below = used


def _sizes(run: int) -> list[int]:
    """The powers of two under it, and it."""
    return [1 << i for i in range((run - 1).bit_length())] + [run]


def _dividing(columns: int) -> int:
    """The most columns of a product that divide all, in whole registers."""
    registers = columns // LANES
    most = max(1, _MOST_COLUMNS // LANES)
    return LANES * max(n for n in range(1, most + 1) if registers % n == 0)


def _dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    return lax.dot_general(
        left,
        right,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if right.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
