"""Grouped delta matmul on NVIDIA Hopper, in Pallas Mosaic GPU.

Work is cut into items, a block of rows by a group with an adapter in it. Few items cannot fill the chip, so
there are two kernels: *shrink*, whose CUDA blocks take an item and a part of the inputs, and *expand*, whose
blocks take an item and a part of the columns, sum what the parts gave, and add into y, in place. Where items
alone are enough, one kernel does both, and what is between them stays in shared memory.

One warpgroup brings rows and pieces through rings of shared memory buffers, by TMA; the other multiplies. y
itself is not read: TMA adds to it where it lies. The tensor cores take no fewer than 64 rows, of which a
decoding block has 8; the others hold anything, as no row reaches another.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.grouped_delta_matmul import xla
from jblock.pallas_kernels.groups import items

ROWS = 64
"""Rows of a wgmma accumulator."""

_DECODE_ROWS = 8  # of an item, where groups are short
_MOST_RANKS = 64  # of an adapter in one call; longer ones take several
_RUN_RANKS = 16  # least that a product sums over
_COLUMNS = 128  # of y, that are added to at a time; in decoding half, so that two blocks fit a multiprocessor
_SHRINK_STAGES = 3
_MOST_SUMS = 256  # rows of shared memory for the sums of all parts of the inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static of a kernel.

    Attributes:
      shrink: whether it multiplies by the first halves of the pieces.
      expand: whether it multiplies by the second halves.
      rows: of an item, 8 or 64.
      rank: of a piece.
      pieces: of an adapter, whole runs of them.
      inputs: of a step of shrink.
      steps: that cover all inputs.
      input_parts: that they are divided into.
      columns: of a step of expand.
      column_blocks: that cover all columns.
      column_parts: that they are divided into.
    """

    shrink: bool = True
    expand: bool = True
    rows: int
    rank: int
    pieces: int
    inputs: int
    steps: int
    input_parts: int
    columns: int
    column_blocks: int
    column_parts: int

    @property
    def fused(self) -> bool:
        """Whether one kernel does both."""
        return self.input_parts == self.column_parts == 1

    @property
    def ranks(self) -> int:
        """Of an adapter at most."""
        return self.pieces * self.rank

    @property
    def run(self) -> int:
        """Pieces that expand sums over at a time."""
        return max(1, _RUN_RANKS // self.rank)

    @property
    def expand_stages(self) -> int:
        """Buffers of expand's ring."""
        return 4 if self.shrink else 8


def serves(a: jax.Array, b: jax.Array) -> bool:
    """Whether the kernels take such tables. Others go through XLA."""
    rank = a.shape[1]
    wide = a.shape[2] % 64 == 0 and b.shape[2] % 64 == 0
    return a.dtype == jnp.bfloat16 and wide and rank in (8, 16, 32, 64)


def make_plan(*, rows: int, groups: int, width: int, out: int, rank: int, turns: int) -> Plan:
    """How a batch is cut."""
    size = ROWS if rows >= 32 * groups else _DECODE_ROWS
    run = max(1, _RUN_RANKS // rank)
    pieces = min(-(-turns // run) * run, _MOST_RANKS // rank)
    inputs = 128 if width % 128 == 0 else 64
    columns = _COLUMNS if size == ROWS and out % _COLUMNS == 0 else _COLUMNS // 2
    steps, column_blocks = width // inputs, out // columns
    # An item a group in decoding, in prefill one a block of rows, and some more where groups meet.
    working = groups if size == _DECODE_ROWS else -(-rows // size)
    fill = -(-2 * hopper.MULTIPROCESSORS // working)
    if working >= hopper.MULTIPROCESSORS:
        fill = 1
    return Plan(
        rows=size,
        rank=rank,
        pieces=pieces,
        inputs=inputs,
        steps=steps,
        input_parts=max(1, min(fill, steps // 4, 8, _MOST_SUMS // size)),
        columns=columns,
        column_blocks=column_blocks,
        column_parts=min(fill, column_blocks),
    )


def grouped_delta_matmul(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pieces: jax.Array,
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
    plan: Plan | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.grouped_delta_matmul`.

    Args beyond it:
      plan: how to cut the work; None: make_plan's.
      interpret: parameters of the Mosaic GPU interpreter, for tests.
    """
    if not serves(a, b):
        return xla.grouped_delta_matmul(y, x, a, b, pieces, group_sizes)
    (rows, width), out, rank = x.shape, y.shape[1], a.shape[1]
    groups, turns = pieces.shape
    if plan is None:
        plan = make_plan(rows=rows, groups=groups, width=width, out=out, rank=rank, turns=turns)
    x = x.astype(jnp.bfloat16)
    result = jax.new_ref(y, memory_space=plgpu.GMEM)
    for first in range(0, turns, plan.pieces):
        # Behind an adapter's last piece comes piece 0, which is zeros.
        mine = pieces[:, first : first + plan.pieces]
        mine = jnp.pad(mine, ((0, 0), (0, plan.pieces - mine.shape[1])))
        _add(plan, result, x, a, b, mine, group_sizes, interpret)
    return result[...]


def _add(
    plan: Plan,
    result: Any,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pieces: jax.Array,
    group_sizes: jax.Array,
    interpret: Any,
) -> None:
    """Adds the deltas of at most `plan.pieces` pieces a group to `result`."""
    counts = jnp.sum(pieces > 0, axis=1, dtype=jnp.int32)
    todo = items(group_sizes.astype(jnp.int32), x.shape[0], plan.rows, counts > 0)
    used = jnp.arange(todo.group.size) < todo.count
    runs = jnp.where(used, -(-counts[todo.group] // plan.run), 0)
    fields = todo.block, todo.first, todo.last, runs
    x = hopper.whole_tiles(x)
    table = jnp.concatenate([jnp.stack(fields, axis=1), pieces[todo.group]], axis=1)
    if plan.fused:
        _call(plan, table, {"x": x, "a": a, "b": b, "y": result}, interpret)
        return
    shrink = dataclasses.replace(plan, expand=False)
    sums = _call(shrink, table, {"x": x, "a": a}, interpret)
    expand = dataclasses.replace(plan, shrink=False)
    _call(expand, table, {"sums": sums, "b": b, "y": result}, interpret)


def _call(plan: Plan, table: jax.Array, arrays: dict[str, Any], interpret: Any) -> Any:
    names = ["table", *arrays]
    count = table.shape[0]
    out_type: Any = []
    if not plan.expand:
        shape = (plan.input_parts, count * plan.rows, plan.ranks)
        out_type, names = jax.ShapeDtypeStruct(shape, jnp.float32), [*names, "sums"]

    def body(*refs: Any) -> None:
        named = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
        pl.run_scoped(
            lambda **s: _body(plan, named, types.SimpleNamespace(**s)),
            collective_axes="wg",
            **scratch(plan),
        )

    parts = plan.column_parts if plan.expand else plan.input_parts
    kernel = pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(count, parts), grid_names=("item", "part"), num_threads=2, thread_name="wg"
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        name="grouped_delta_" + ("matmul" if plan.fused else "shrink" if plan.shrink else "expand"),
    )
    return kernel(table, *arrays.values())


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a block, by the names `_body` takes."""
    bf16, f32 = jnp.bfloat16, jnp.float32
    # Every part's rows are read 64 at a time; what is behind them means nothing.
    sums = ROWS if plan.shrink else plan.input_parts * plan.rows + ROWS - plan.rows
    out: dict[str, Any] = {"sums": plgpu.SMEM((sums, plan.ranks), f32)}
    if plan.shrink:
        stages = _SHRINK_STAGES
        out |= {
            "x": hopper.swizzled((stages, ROWS, plan.inputs), bf16),
            "a": hopper.swizzled((stages, plan.ranks, plan.inputs), bf16),
            "a_full": plgpu.Barrier(num_arrivals=1 + plan.pieces, num_barriers=stages),
            "a_free": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        }
    if plan.expand:
        stages, ranks = plan.expand_stages, plan.run * plan.rank
        out |= {
            # The tensor cores sum over as many ranks at least as a tile has columns.
            "b": hopper.swizzled((stages, ranks, plan.columns), bf16, ranks),
            "inner": plgpu.SMEM((plan.ranks // ranks, ROWS, ranks), bf16),
            "added": plgpu.SMEM((2, ROWS, plan.columns), f32),
            "b_full": plgpu.Barrier(num_arrivals=plan.run, num_barriers=stages),
            "b_free": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            "sums_ready": plgpu.Barrier(num_arrivals=plan.input_parts),
        }
    return out


def share(total: int, part: Any, parts: int) -> tuple[Any, Any]:
    """First of the steps of a part, and how many it has, of `total` divided evenly."""
    begin = lax.div(part * total, parts)
    return begin, lax.div((part + 1) * total, parts) - begin


def _body(plan: Plan, refs: Any, s: Any) -> None:
    """One item by a part of the inputs or of the columns, or by all of both.

    Args:
      plan: what is static.
      refs: table int32 [N, 4 + pieces] of block, first and last row in it, runs, and pieces; x [T, in]; a
        [P, R, in]; b [P, R, out]; y [T, out]; sums [input_parts, N * rows, ranks], which shrink writes and
        expand reads.
      s: what `scratch` lists.
    """
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
    plan: Plan, refs: Any, s: Any, item: Any, part: Any, begin: Any, runs: Any
) -> None:
    """Rows of x, and the first halves of the item's pieces, step by step."""
    first, count = share(plan.steps, part, plan.input_parts)
    stages = _SHRINK_STAGES
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


def _bring_columns(plan: Plan, refs: Any, s: Any, item: Any, part: Any, runs: Any) -> None:
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


def _shrink(plan: Plan, s: Any, part: Any) -> None:
    """[rows, ranks] of a part of the inputs, into s.sums."""
    _, count = share(plan.steps, part, plan.input_parts)

    def arrived(i: Any) -> None:
        plgpu.barrier_wait(s.a_full.at[lax.rem(i, _SHRINK_STAGES)])

    def operands(i: Any) -> tuple[hopper.Ref, hopper.Ref]:
        slot = lax.rem(i, _SHRINK_STAGES)
        return s.x.at[slot], s.a.at[slot]

    def read(i: Any) -> None:
        plgpu.barrier_arrive(s.a_free.at[lax.rem(i, _SHRINK_STAGES)])

    shape = (ROWS, plan.ranks)
    s.sums[0:ROWS] = hopper.sum_of_products(shape, count, arrived, operands, read)


def _expand(
    plan: Plan, refs: Any, s: Any, part: Any, begin: Any, first: Any, last: Any, runs: Any
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
