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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.grouped_delta_matmul import gpu_kernel, xla
from jblock.pallas_kernels.grouped_delta_matmul.gpu_plan import (
    ROWS,
    RUN_RANKS,
    Arrays,
    Plan,
    Scratch,
    scratch,
)
from jblock.pallas_kernels.groups import items

_DECODE_ROWS = 8  # of an item, where groups are short
_MOST_RANKS = 64  # of an adapter in one call; longer ones take several
_COLUMNS = 128  # of y, that are added to at a time; in decoding half, so that two blocks fit a multiprocessor
_MOST_SUMS = 256  # rows of shared memory for the sums of all parts of the inputs


def serves(a: jax.Array, b: jax.Array) -> bool:
    """Whether the kernels take such tables. Others go through XLA."""
    rank = a.shape[1]
    wide = a.shape[2] % 64 == 0 and b.shape[2] % 64 == 0
    return a.dtype == jnp.bfloat16 and wide and rank in (8, 16, 32, 64)


def make_plan(*, rows: int, groups: int, width: int, out: int, rank: int, turns: int) -> Plan:
    """How a batch is cut."""
    size = ROWS if rows >= 32 * groups else _DECODE_ROWS
    run = max(1, RUN_RANKS // rank)
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
        named = Arrays(**dict(zip(names, refs, strict=True)))
        pl.run_scoped(
            lambda **s: gpu_kernel.body(plan, named, Scratch(**s)),
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
