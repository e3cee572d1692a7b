"""Quantized matmul on NVIDIA Hopper, in Pallas Mosaic GPU: weights come from memory in their 8 or 4 bits.

The product is made transposed, columns of the result by rows of x: weights are widened in registers, from
which the tensor cores take their left operand alone. A CUDA block has 64 or 128 columns, up to 128 rows and,
where there are few of both, a part of the inputs. One warpgroup brings, the others multiply 64 columns each:
whole numbers, which bfloat16 holds exactly; the product of a group takes its scales on its way into the sum.
While one warpgroup widens and scales, the tensor cores have the other's product.

Zeros are taken off outside: their share is a product of the sums of x over each group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.hopper import Ref
from jblock.pallas_kernels.quantized_matmul import xla

COLUMNS = 64
"""Columns of a compute warpgroup."""

_MOST_ROWS = 128  # of a block: the sum and a group's product both lie in registers
_DECODE_BYTES = 100 * 1024  # of shared memory, so that two blocks share a multiprocessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static of one kernel.

    Attributes:
      rows: of a block, a multiple of 8.
      row_blocks: how many.
      warpgroups: that compute, 1 or 2.
      column_blocks: how many, each of 64 columns a warpgroup.
      inputs: of a step; they share their scales.
      steps: that cover all inputs.
      steps_a_group: steps of a scale.
      parts: that the steps are divided into; XLA adds their results up.
      stages: buffers of the ring.
    """

    rows: int
    row_blocks: int
    warpgroups: int
    column_blocks: int
    inputs: int
    steps: int
    steps_a_group: int
    parts: int
    stages: int

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return COLUMNS * self.warpgroups


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Of a call, in device memory."""

    x: Ref  # [T, in]
    w: Ref  # int8 or int4 [out, in]
    scales: Ref  # float32 [out, groups]
    out: Ref  # float32 [parts, rows, out]


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Of a CUDA block, in shared memory."""

    x: Ref  # [stages, rows, inputs]
    w: Ref  # [stages, columns, inputs]
    result: Ref  # float32 [warpgroups, rows, COLUMNS]
    full: Ref  # barriers [stages]: rows and weights are there
    free: Ref  # barriers [stages]: all warpgroups have read them


def serves(x: jax.Array, w_q: jax.Array, scales: jax.Array) -> bool:
    """Whether the kernel takes such a product. Others go through XLA, which widens all weights first."""
    group = x.shape[1] // scales.shape[1]
    codes = w_q.dtype in (jnp.int8, jnp.int4)
    return codes and x.dtype == jnp.bfloat16 and group % 64 == 0 and w_q.shape[0] % COLUMNS == 0


def make_plan(*, rows: int, width: int, out: int, group: int, bits: int) -> Plan:
    """How a product is cut: enough blocks to fill the chip, and no more parts than that takes."""
    inputs = 128 if group % 128 == 0 else 64
    size = min(_MOST_ROWS, -(-rows // 8) * 8)
    warpgroups = 2 if out % (2 * COLUMNS) == 0 else 1
    columns, steps = COLUMNS * warpgroups, width // inputs
    blocks = out // columns * -(-rows // size)
    result = 4 * size * columns
    memory = hopper.SHARED_MEMORY if size == _MOST_ROWS else _DECODE_BYTES
    step = columns * inputs * bits // 8 + 2 * size * inputs
    return Plan(
        rows=size,
        row_blocks=-(-rows // size),
        warpgroups=warpgroups,
        column_blocks=out // columns,
        inputs=inputs,
        steps=steps,
        steps_a_group=group // inputs,
        parts=max(1, min(2 * hopper.MULTIPROCESSORS // blocks, steps // 4)),
        stages=max(2, min(8, (memory - result) // step)),
    )


def quantized_matmul(
    x: jax.Array,
    w_q: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    device_kind: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.quantized_matmul`; interpret: parameters of the Mosaic GPU interpreter, for tests."""
    if not serves(x, w_q, scales):
        return xla.at_once(x, w_q, scales, zeros)
    (rows, width), (out, groups) = x.shape, scales.shape
    group = width // groups
    bits = 4 if w_q.dtype == jnp.int4 else 8
    plan = make_plan(rows=rows, width=width, out=out, group=group, bits=bits)
    y = _call(plan, x, w_q, scales, interpret)
    if zeros is None:
        return y
    sums = x.astype(jnp.float32).reshape(rows, -1, group).sum(axis=2)
    return y - jnp.dot(sums, (scales * zeros).T, precision=lax.Precision.HIGHEST)


def _call(plan: Plan, x: jax.Array, w_q: jax.Array, scales: jax.Array, interpret: Any) -> jax.Array:
    stages, inputs = plan.stages, plan.inputs

    def body(x_ref: Any, w_ref: Any, scales_ref: Any, out_ref: Any) -> None:
        arrays = _Arrays(x=x_ref, w=w_ref, scales=scales_ref, out=out_ref)
        pl.run_scoped(
            lambda **s: _body(plan, arrays, _Scratch(**s)),
            collective_axes="wg",
            x=hopper.swizzled((stages, plan.rows, inputs), jnp.bfloat16),
            w=hopper.swizzled((stages, plan.columns, inputs), w_q.dtype),
            result=hopper.swizzled((plan.warpgroups, plan.rows, COLUMNS), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
        )

    rows = plan.rows * plan.row_blocks
    kernel = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.parts, rows, w_q.shape[0]), jnp.float32),
        mesh=plgpu.Mesh(
            # Blocks of rows last: those that run side by side share their weights.
            grid=(plan.parts, plan.column_blocks, plan.row_blocks),
            grid_names=("part", "columns", "rows"),
            num_threads=plan.warpgroups + 1,
            thread_name="wg",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        name="quantized_matmul",
    )
    parts = kernel(hopper.whole_tiles(x), w_q, scales)
    return (parts[0] if plan.parts == 1 else parts.sum(axis=0))[: x.shape[0]]


def _body(plan: Plan, refs: _Arrays, s: _Scratch) -> None:
    """One block."""
    part = lax.axis_index("part")
    column = lax.axis_index("columns") * plan.columns
    rows = pl.ds(lax.axis_index("rows") * plan.rows, plan.rows)
    begin = lax.div(part * plan.steps, plan.parts)
    count = lax.div((part + 1) * plan.steps, plan.parts) - begin
    wg = lax.axis_index("wg")

    @pl.when(wg == plan.warpgroups)
    def _move() -> None:
        if plan.warpgroups > 1:
            plgpu.set_max_registers(56, action="decrease")

        @pl.loop(0, count)
        def _step(i: Any) -> None:
            slot = lax.rem(i, plan.stages)
            pl.when(i >= plan.stages)(lambda: plgpu.barrier_wait(s.free.at[slot]))
            inputs = pl.ds((begin + i) * plan.inputs, plan.inputs)
            plgpu.copy_gmem_to_smem(refs.x.at[rows, inputs], s.x.at[slot], s.full.at[slot])
            plgpu.copy_gmem_to_smem(
                refs.w.at[pl.ds(column, plan.columns), inputs], s.w.at[slot], s.full.at[slot]
            )

        @pl.loop(jnp.maximum(count - plan.stages, 0), count)
        def _drain(i: Any) -> None:
            plgpu.barrier_wait(s.free.at[lax.rem(i, plan.stages)])

    @pl.when(wg < plan.warpgroups)
    def _compute() -> None:
        if plan.warpgroups > 1:
            plgpu.set_max_registers(208, action="increase")
        mine = pl.ds(column + wg * COLUMNS, COLUMNS)

        def scales_of(i: Any) -> jax.Array:
            return hopper.load_rows(refs.scales.at[mine, lax.div(begin + i, plan.steps_a_group)])

        def step(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, scale = carry
            # The next step's are on their way while this one is multiplied.
            following = scales_of(jnp.minimum(i + 1, count - 1))
            slot = lax.rem(i, plan.stages)
            plgpu.barrier_wait(s.full.at[slot])
            weights = hopper.load_widened(s.w.at[slot, pl.ds(wg * COLUMNS, COLUMNS)])
            product = hopper.matmul(weights, s.x.at[slot], transpose_b=True)
            plgpu.barrier_arrive(s.free.at[slot])
            return total + product * lax.broadcast_in_dim(scale, product.shape, [0]), following

        zeros = hopper.accumulator((COLUMNS, plan.rows), 0.0)
        total, _ = lax.fori_loop(0, count, step, (zeros, scales_of(0)))
        hopper.store_transposed(s.result.at[wg], total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.result.at[wg], refs.out.at[part, rows, mine])
        plgpu.wait_smem_to_gmem(0)
