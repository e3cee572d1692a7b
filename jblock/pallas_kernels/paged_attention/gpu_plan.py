"""What is static of one Hopper kernel of ragged paged attention: tile sizes, and what a CUDA block allots."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention.quantize import is_scaled

ROWS = 64
"""Rows of a wgmma accumulator: what one compute warpgroup serves."""

LAUNCH_REGISTERS = 168
"""Of a thread, where a block is three warpgroups: all that a multiprocessor has, in whole eights."""

WRITE_ROWS = 16
"""New rows that are staged at a time at most."""

_EDGE_ROWS = 16  # of a page that is seen in part


def token_rows(groups: int, head_dim: int, item: int = 2) -> int:
    """See Plan.token_rows; item: bytes of a value."""
    unit = 128 // math.gcd(head_dim * item, 128)
    return -(-groups // unit) * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static of one kernel.

    Attributes:
      groups: query heads of a KV head.
      head_dim: width of a head, a multiple of 16.
      page_size: tokens of a page.
      max_q_len: bound on the new tokens of a sequence.
      kv_dtype: dtype of the pages.
      compute_warpgroups: 1 or 2; a tile has that many times 64 // groups tokens.
      block_kv: keys of a step, a multiple of 64 that divides page_size or is a multiple of it.
      stages: buffers of the ring.
      splits: parts that the keys of a tile are divided into.
      sliding_window: as in `api.paged_attention`.
      softcap: likewise.
      scale: likewise.
    """

    groups: int
    head_dim: int
    page_size: int
    max_q_len: int
    kv_dtype: Any
    compute_warpgroups: int
    block_kv: int
    stages: int
    splits: int
    sliding_window: int | None
    softcap: float | None
    scale: float

    @property
    def token_rows(self) -> int:
        """Rows of a tile that a token takes: its heads, and idle ones where TMA's alignment of 128 bytes
        asks for them."""
        return token_rows(self.groups, self.head_dim)

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens that one compute warpgroup has room for."""
        return ROWS // self.token_rows

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile has room for."""
        return self.compute_warpgroups * self.warpgroup_tokens

    @property
    def piece(self) -> int:
        """Keys that one copy brings of a cached block: a page, or the part of one that is the block."""
        return min(self.page_size, self.block_kv)

    @property
    def pieces(self) -> int:
        """Pieces of a cached block."""
        return self.block_kv // self.piece

    @property
    def edge(self) -> int:
        """Keys of one copy where a piece is seen in part: at the window's edge and the end of the cache."""
        return min(self.piece, _EDGE_ROWS)

    @property
    def edges(self) -> int:
        """Runs of `edge` keys in a block: copies that bring one that is seen in part."""
        return self.block_kv // self.edge

    @property
    def new_piece(self) -> int:
        """Keys that the one copy of a new block brings: for decoding the eight rows of a swizzle."""
        return min(self.block_kv, -(-self.max_q_len // 8) * 8)

    @property
    def write_rows(self) -> int:
        """New rows staged at a time on their way into the pages."""
        return min(WRITE_ROWS, self.max_q_len)

    @property
    def write_pad(self) -> int:
        """Rows of shared memory that each of them takes: TMA wants them at multiples of 128 bytes."""
        return token_rows(1, self.head_dim, jnp.dtype(self.kv_dtype).itemsize)

    @property
    def scaled(self) -> bool:
        """Whether pages are of 8 bits, with scales."""
        return is_scaled(self.kv_dtype)

    @property
    def arrivals(self) -> int:
        """Copies that bring the keys, or the values, of a whole cached block: one a page, and one of its
        scales."""
        return self.pieces * (2 if self.scaled else 1)

    @property
    def barrier_ops(self) -> int:
        """How often threads arrive at barriers for the keys and values of a whole cached block."""
        return 2 * self.arrivals * hopper.COPY_ARRIVALS

    @property
    def wide_keys(self) -> int:
        """Buffers of widened keys, with 8-bit pages: of two computing warpgroups one still multiplies by a
        block when the next one is widened."""
        return self.compute_warpgroups

    @property
    def registers(self) -> tuple[int, int] | None:
        """Registers of a thread that computes, and of one that moves memory; None: as launched.

        They are taken from what the launch gave, LAUNCH_REGISTERS a thread: asking for more waits for ever.
        """
        if self.compute_warpgroups == 1:
            return None
        return (232, 40) if self.head_dim > 128 else (224, 56)

    @property
    def out_dtype(self) -> Any:
        """Parts of a softmax are combined in float32."""
        return jnp.float32 if self.splits > 1 else jnp.bfloat16


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a block, by the fields of gpu_refs.Scratch."""
    wgs, d, bf16 = plan.compute_warpgroups, plan.head_dim, jnp.bfloat16
    ring, tile = (plan.stages, plan.block_kv, d), hopper.swizzle_columns(d, bf16)
    queries = min(plan.warpgroup_tokens, plan.max_q_len)
    writes = 1 if plan.write_pad == 1 else plan.write_rows
    out = {
        "q_rows": plgpu.SMEM((wgs, ROWS, d), bf16),
        "q_tile": hopper.swizzled((wgs, ROWS, d), bf16),
        "k_ring": hopper.swizzled(ring, plan.kv_dtype, tile),
        "v_ring": hopper.swizzled(ring, plan.kv_dtype, tile),
        "k_write": plgpu.SMEM((plan.write_rows, plan.write_pad, d), plan.kv_dtype),
        "v_write": plgpu.SMEM((plan.write_rows, plan.write_pad, d), plan.kv_dtype),
        "q_ready": plgpu.Barrier(num_arrivals=queries, num_barriers=wgs),
        # Whole blocks take one arrival for each page, and one for its scales.
        "k_full": plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=plan.stages),
        "v_full": plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=plan.stages),
        # Of keys, and of values, of a block that is seen in part.
        "k_edges_full": plgpu.Barrier(num_arrivals=plan.edges),
        "v_edges_full": plgpu.Barrier(num_arrivals=plan.edges),
        "k_consumed": plgpu.Barrier(num_arrivals=wgs, num_barriers=plan.stages),
        "v_consumed": plgpu.Barrier(num_arrivals=wgs, num_barriers=plan.stages),
        "turn": plgpu.Barrier(num_arrivals=wgs),
        "write_ready": plgpu.Barrier(num_arrivals=2 * writes),
    }
    if plan.scaled:
        scales, block = plgpu.SMEM((plan.stages, plan.block_kv), jnp.float32), (plan.block_kv, d)
        out |= {
            "k_ring_scales": scales,
            "v_ring_scales": scales,
            "k_wide": hopper.swizzled((plan.wide_keys, *block), bf16),
            "v_wide": hopper.swizzled(block, bf16),
        }
    if plan.splits > 1:
        out["out_rows"] = plgpu.SMEM((wgs, ROWS, d), jnp.float32)
        out["lse_rows"] = plgpu.SMEM((ROWS,), jnp.float32)
    return out
