"""The Hopper kernels of grouped deltas: what one CUDA block does (Mosaic GPU); see `mosaic_gpu`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.grouped_delta_matmul.gpu_plan import (
    ROWS,
    SHRINK_STAGES,
    Arrays,
    Plan,
    Scratch,
)


def share(total: int, part: Any, parts: int) -> tuple[Any, Any]:
    """First of the steps of a part, and how many it has, of `total` divided evenly."""
    begin = lax.div(part * total, parts)
    return begin, lax.div((part + 1) * total, parts) - begin


def body(plan: Plan, refs: Arrays, s: Scratch) -> None:
    """One item by a part of the inputs or of the columns, or by all of both."""
    item, part = lax.axis_index("item"), lax.axis_index("part")
    block, first, last, runs = (refs.table[item, i] for i in range(4))
    wg = lax.axis_index("wg")
    begin = block * plan.rows

    @pl.when((wg == 1) & (runs > 0))
    def _move() -> None:
        if plan.shrink:
            _bring_inputs(plan, refs, s, item, part, begin, runs)
        if plan.expand:
            _bring_columns(plan, refs, s, item, part, runs)

    @pl.when((wg == 0) & (runs > 0))
    def _compute() -> None:
        if plan.shrink:
            _shrink(plan, s, part)
        if not plan.expand:
            plgpu.commit_smem()
            rows = pl.ds(item * plan.rows, plan.rows)
            plgpu.copy_smem_to_gmem(s.sums.at[pl.ds(0, plan.rows)], refs.sums.at[part, rows])
            plgpu.wait_smem_to_gmem(0)
            return
        if not plan.shrink:
            for p in range(plan.input_parts):
                plgpu.copy_gmem_to_smem(
                    refs.sums.at[p, pl.ds(item * plan.rows, plan.rows)],
                    s.sums.at[pl.ds(p * plan.rows, plan.rows)],
                    s.sums_ready,
                )
            plgpu.barrier_wait(s.sums_ready)
        _expand(plan, refs, s, part, begin, first, last, runs)


def _bring_inputs(
    plan: Plan, refs: Arrays, s: Scratch, item: Any, part: Any, begin: Any, runs: Any
) -> None:
    """Rows of x, and the first halves of the item's pieces, step by step."""
    first, count = share(plan.steps, part, plan.input_parts)
    stages = SHRINK_STAGES
    pieces = [refs.table[item, 4 + p] for p in range(plan.pieces)]

    @pl.loop(0, count)
    def _step(i: Any) -> None:
        slot = lax.rem(i, stages)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(s.a_free.at[slot]))
        full, inputs = s.a_full.at[slot], pl.ds((first + i) * plan.inputs, plan.inputs)
        plgpu.copy_gmem_to_smem(
            refs.x.at[pl.ds(begin, plan.rows), inputs], s.x.at[slot, pl.ds(0, plan.rows)], full
        )
        for p, piece in enumerate(pieces):

            @pl.when(p < runs * plan.run)
            def _copy(p: int = p, piece: Any = piece) -> None:
                ranks = pl.ds(p * plan.rank, plan.rank)
                plgpu.copy_gmem_to_smem(refs.a.at[piece, :, inputs], s.a.at[slot, ranks], full)

            pl.when(p >= runs * plan.run)(lambda: plgpu.barrier_arrive(full))

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(s.a_free.at[lax.rem(i, stages)])


def _bring_columns(plan: Plan, refs: Arrays, s: Scratch, item: Any, part: Any, runs: Any) -> None:
    """The second halves of the item's pieces: for each block of columns, run by run."""
    first, count = share(plan.column_blocks, part, plan.column_parts)
    stages, total = plan.expand_stages, count * runs

    @pl.loop(0, total)
    def _step(i: Any) -> None:
        slot = lax.rem(i, stages)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(s.b_free.at[slot]))
        column, run = lax.div(i, runs), lax.rem(i, runs)
        columns = pl.ds((first + column) * plan.columns, plan.columns)
        for p in range(plan.run):
            piece = refs.table[item, 4 + run * plan.run + p]
            ranks = pl.ds(p * plan.rank, plan.rank)
            plgpu.copy_gmem_to_smem(
                refs.b.at[piece, :, columns], s.b.at[slot, ranks], s.b_full.at[slot]
            )

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(s.b_free.at[lax.rem(i, stages)])


def _shrink(plan: Plan, s: Scratch, part: Any) -> None:
    """[rows, ranks] of a part of the inputs, into s.sums."""
    _, count = share(plan.steps, part, plan.input_parts)

    def arrived(i: Any) -> None:
        plgpu.barrier_wait(s.a_full.at[lax.rem(i, SHRINK_STAGES)])

    def operands(i: Any) -> tuple[hopper.Ref, hopper.Ref]:
        slot = lax.rem(i, SHRINK_STAGES)
        return s.x.at[slot], s.a.at[slot]

    def read(i: Any) -> None:
        plgpu.barrier_arrive(s.a_free.at[lax.rem(i, SHRINK_STAGES)])

    shape = (ROWS, plan.ranks)
    s.sums[0:ROWS] = hopper.sum_of_products(shape, count, arrived, operands, read)


def _expand(
    plan: Plan, refs: Arrays, s: Scratch, part: Any, begin: Any, first: Any, last: Any, runs: Any
) -> None:
    """Adds to the item's rows of y, in a part of its columns."""
    begin_block, count = share(plan.column_blocks, part, plan.column_parts)
    stages, ranks = plan.expand_stages, plan.run * plan.rank
    for r in range(plan.ranks // ranks):
        # Ranks that the adapter has not got are never multiplied.
        at = slice(r * ranks, (r + 1) * ranks)
        parts = [
            hopper.load(s.sums.at[p * plan.rows : p * plan.rows + ROWS, at])
            for p in range(plan.input_parts)
        ]
        s.inner[r] = sum(parts[1:], parts[0]).astype(jnp.bfloat16)

    @pl.loop(0, count)
    def _columns(c: Any) -> None:
        def add(r: Any, total: jax.Array) -> jax.Array:
            slot = lax.rem(c * runs + r, stages)
            inner = hopper.load(s.inner.at[r])
            plgpu.barrier_wait(s.b_full.at[slot])
            total += hopper.matmul(inner, s.b.at[slot])
            plgpu.barrier_arrive(s.b_free.at[slot])
            return total

        delta = lax.fori_loop(0, runs, add, hopper.accumulator((ROWS, plan.columns), 0.0))
        # Of the two buffers the one before last has left.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        added = s.added.at[lax.rem(c, 2)]
        added[...] = delta
        plgpu.commit_smem()
        columns = pl.ds((begin_block + c) * plan.columns, plan.columns)

        @pl.when(last - first == plan.rows)
        def _add_all() -> None:
            plgpu.copy_smem_to_gmem(
                added.at[pl.ds(0, plan.rows)],
                refs.y.at[pl.ds(begin, plan.rows), columns],
                reduction_op="add",
                commit_group=False,
            )

        @pl.when(last - first < plan.rows)
        def _add_rows() -> None:
            @pl.loop(first, last)
            def _row(r: Any) -> None:
                plgpu.copy_smem_to_gmem(
                    added.at[pl.ds(r, 1)],
                    refs.y.at[pl.ds(begin + r, 1), columns],
                    reduction_op="add",
                    commit_group=False,
                )

        plgpu.commit_smem_to_gmem_group()

    plgpu.wait_smem_to_gmem(0)
