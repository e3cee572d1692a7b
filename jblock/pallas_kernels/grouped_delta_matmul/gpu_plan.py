"""What is static of a Hopper kernel of grouped deltas, and the memory that it names."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.hopper import Ref

ROWS = 64
"""Rows of a wgmma accumulator."""

RUN_RANKS = 16
"""Least that a product sums over."""

SHRINK_STAGES = 3
"""Buffers of shrink's ring."""


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
        return max(1, RUN_RANKS // self.rank)

    @property
    def expand_stages(self) -> int:
        """Buffers of expand's ring."""
        return 4 if self.shrink else 8


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Of a call, in device memory; N items."""

    table: Ref  # int32 [N, 4 + pieces] of block, first and last row in it, runs, and pieces
    x: Ref = None  # [T, in]
    a: Ref = None  # [P, R, in]
    b: Ref = None  # [P, R, out]
    y: Ref = None  # float32 [T, out]
    sums: Ref = None  # float32 [input_parts, N * rows, ranks]: shrink writes it, expand reads it


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Of a CUDA block, in shared memory: what is not of shrink or expand is None in a kernel without it."""

    sums: Ref  # float32 [64 and more, ranks], those of all parts of the inputs below each other
    x: Ref = None  # [SHRINK_STAGES, ROWS, inputs]
    a: Ref = None  # [SHRINK_STAGES, ranks, inputs]
    a_full: Ref = None  # barriers [SHRINK_STAGES]: rows and pieces are there
    a_free: Ref = None  # barriers [SHRINK_STAGES]: they were read
    b: Ref = None  # [expand_stages, ranks of a run, columns]
    inner: Ref = None  # [runs, ROWS, ranks of a run]
    added: Ref = None  # float32 [2, ROWS, columns]
    b_full: Ref = None  # barriers [expand_stages]
    b_free: Ref = None  # barriers [expand_stages]
    sums_ready: Ref = None  # barrier: the sums of all parts are there


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a block, by the fields of Scratch."""
    bf16, f32 = jnp.bfloat16, jnp.float32
    # Every part's rows are read 64 at a time; what is behind them means nothing.
    sums = ROWS if plan.shrink else plan.input_parts * plan.rows + ROWS - plan.rows
    out: dict[str, Any] = {"sums": plgpu.SMEM((sums, plan.ranks), f32)}
    if plan.shrink:
        stages = SHRINK_STAGES
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
