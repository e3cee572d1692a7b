"""Grouped block matmul on NVIDIA Hopper, in Pallas Mosaic GPU.

A CUDA block has an item, up to 128 rows of one variant, and 128 columns of the result, over all inputs. One
warpgroup brings rows and weights through a ring of shared memory buffers, by TMA; one or two multiply 64
rows each. The tensor cores take no fewer than 64 rows, so in decoding most of what they do is for nothing:
it is still less than reading the weights takes (64 products a weight of 2 bytes; an H200 does 200 in the
time).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.grouped_block_matmul import xla
from jblock.pallas_kernels.groups import Items, choose, items
from jblock.pallas_kernels.hopper import Ref
from jblock.pallas_kernels.pieces import piece_bound

ROWS = 64
"""Rows of a compute warpgroup."""

_INPUTS = 64  # of a step: a row of 128 bytes, the widest swizzle
_MOST_VARIANTS = 16
"""Of one kernel, which has code for each; more are served by several."""


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Of a call, in device memory; N items."""

    table: Ref  # int32 [N, 4] of block, group, first and last row
    x: Ref  # [T, in]
    weights: tuple[Ref, ...]  # [out, in] each
    out: Ref  # float32 [T, out]


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Of a CUDA block, in shared memory."""

    x: Ref  # [stages, rows, _INPUTS]
    w: Ref  # [stages, columns, _INPUTS]
    result: Ref  # float32 [warpgroups, ROWS, columns]
    full: Ref  # barriers [stages]: rows and weights are there
    free: Ref  # barriers [stages]: all warpgroups have read them


def grouped_block_matmul(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.grouped_block_matmul`; interpret: parameters of the Mosaic GPU interpreter, for tests. Weights
    that are not bfloat16, or of widths that are no multiples of 64, go through XLA."""
    rows, (out, width) = x.shape[0], weights[0].shape
    if weights[0].dtype != jnp.bfloat16 or width % _INPUTS or out % _INPUTS:
        return xla.grouped_block_matmul(x, weights, group_sizes)
    warpgroups = 2 if rows > ROWS * len(weights) else 1
    # What is behind the last variant's rows is a variant without a weight, whose result is zeros.
    rest = rows - jnp.sum(group_sizes, dtype=jnp.int32)
    sizes = jnp.concatenate([group_sizes.astype(jnp.int32), rest[None]])
    group = jnp.arange(sizes.size)
    x = x.astype(jnp.bfloat16)
    runs = [weights[i : i + _MOST_VARIANTS] for i in range(0, len(weights), _MOST_VARIANTS)]
    if len(runs) == 1:
        todo = items(sizes, rows, ROWS * warpgroups)
        return _call(x, weights, todo, 0, warpgroups, None, interpret)
    result = jax.new_ref(jnp.zeros((rows, out), jnp.float32), memory_space=plgpu.GMEM)
    for i, run in enumerate(runs):
        first = i * _MOST_VARIANTS
        last = first + len(run) + (i == len(runs) - 1)
        wanted = (group >= first) & (group < last)
        todo = items(sizes, rows, ROWS * warpgroups, wanted)
        _call(x, run, todo, first, warpgroups, result, interpret)
    return result[...]


def _call(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    todo: Items,
    first: int,
    warpgroups: int,
    result: Any,
    interpret: Any,
) -> jax.Array:
    """The items' rows of the result, [T, out], or written into `result`; weights are those of the
    variants from `first` on."""
    rows, (out, width) = x.shape[0], weights[0].shape
    columns = 128 if out % 128 == 0 else 64
    size, stages = ROWS * warpgroups, 6 if warpgroups == 1 else 4
    used = jnp.arange(todo.group.size) < todo.count
    fields = todo.block, todo.group - first, todo.first, jnp.where(used, todo.last, todo.first)
    # Items of the other variants have no blocks here: those wanted come first.
    bound = piece_bound(len(weights) + 1, rows, rows, size)
    table = jnp.stack(fields, axis=1)[:bound]
    steps = width // _INPUTS

    def body(table_ref: Any, x_ref: Any, *refs: Any) -> None:
        at = refs[: len(weights)]
        arrays = _Arrays(table=table_ref, x=x_ref, weights=at, out=refs[-1])
        pl.run_scoped(
            lambda **s: _body(arrays, _Scratch(**s), warpgroups, stages, steps),
            collective_axes="wg",
            x=hopper.swizzled((stages, size, _INPUTS), jnp.bfloat16),
            w=hopper.swizzled((stages, columns, _INPUTS), jnp.bfloat16),
            result=plgpu.SMEM((warpgroups, ROWS, columns), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        )

    kernel = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, out), jnp.float32) if result is None else [],
        mesh=plgpu.Mesh(
            grid=(out // columns, table.shape[0]),
            grid_names=("columns", "item"),
            num_threads=warpgroups + 1,
            thread_name="wg",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        name="grouped_block_matmul",
    )
    x = hopper.whole_tiles(x)
    return kernel(table, x, *weights, *(() if result is None else (result,)))


def _body(refs: _Arrays, s: _Scratch, warpgroups: int, stages: int, steps: int) -> None:
    """One item by some columns."""
    size = s.w.shape[1]
    column, item = lax.axis_index("columns") * size, lax.axis_index("item")
    block, group, first, last = (refs.table[item, i] for i in range(4))
    wg = lax.axis_index("wg")
    begin = block * (ROWS * warpgroups)
    variants = len(refs.weights)
    products = jnp.where(group < variants, steps, 0)

    @pl.when((wg == warpgroups) & (last > first))
    def _move() -> None:
        @pl.loop(0, products)
        def _step(i: Any) -> None:
            slot = lax.rem(i, stages)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(s.free.at[slot]))
            inputs = pl.ds(i * _INPUTS, _INPUTS)
            plgpu.copy_gmem_to_smem(
                refs.x.at[pl.ds(begin, ROWS * warpgroups), inputs], s.x.at[slot], s.full.at[slot]
            )
            choose(
                group,
                variants,
                lambda v: plgpu.copy_gmem_to_smem(
                    refs.weights[v].at[pl.ds(column, size), inputs],
                    s.w.at[slot],
                    s.full.at[slot],
                ),
            )

        @pl.loop(jnp.maximum(products - stages, 0), products)
        def _drain(i: Any) -> None:
            plgpu.barrier_wait(s.free.at[lax.rem(i, stages)])

    @pl.when((wg < warpgroups) & (last > first))
    def _compute() -> None:
        def arrived(i: Any) -> None:
            plgpu.barrier_wait(s.full.at[lax.rem(i, stages)])

        def operands(i: Any) -> tuple[hopper.Ref, hopper.Ref]:
            slot = lax.rem(i, stages)
            return s.x.at[slot, pl.ds(wg * ROWS, ROWS)], s.w.at[slot]

        def read(i: Any) -> None:
            plgpu.barrier_arrive(s.free.at[lax.rem(i, stages)])

        s.result[wg] = hopper.sum_of_products((ROWS, size), products, arrived, operands, read)
        plgpu.commit_smem()
        low = jnp.clip(first - wg * ROWS, 0, ROWS)
        high = jnp.clip(last - wg * ROWS, 0, ROWS)
        columns = pl.ds(column, size)
        mine = begin + wg * ROWS

        @pl.when(high - low == ROWS)
        def _store_all() -> None:
            plgpu.copy_smem_to_gmem(s.result.at[wg], refs.out.at[pl.ds(mine, ROWS), columns])

        @pl.when(high - low < ROWS)
        def _store_rows() -> None:
            @pl.loop(low, high)
            def _row(r: Any) -> None:
                plgpu.copy_smem_to_gmem(
                    s.result.at[wg, pl.ds(r, 1)], refs.out.at[pl.ds(mine + r, 1), columns]
                )

        plgpu.wait_smem_to_gmem(0)
