"""The memory that one CUDA block of the Hopper kernel names, with shapes.

S sequences, T rows, R rows as TMA brings them, P pages, H query heads, K KV heads, d the width of a head. A
block's arrays are in shared memory: W compute warpgroups, N buffers of a ring, B keys of a step.
"""

import dataclasses

from jblock.pallas_kernels.hopper import Ref


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What a call gets and gives, in device memory.

    Attributes:
      q: [T, H, d].
      k_new, v_new: [R, K, d], new keys and values as they are attended to (`gpu_walk.new_rows`).
      k_rows, v_rows: [T, K, d], as they go into the pages.
      starts: int32 [S], each sequence's first row in k_new and v_new.
      tiles: int32 [tiles, 5], `gpu_walk.tile_table`.
      page_table: int32 [S, max_pages].
      k_pages, v_pages: [P, K, page_size, d].
      k_scales, v_scales: float32 [P, K, page_size], with 8-bit pages.
      k_new_scales, v_new_scales: float32 [K, over R], likewise: of k_new and v_new.
      out: [splits, T, H, d].
      lse: float32 [splits, tiles, K, 64], base 2, with several splits.
    """

    q: Ref
    k_new: Ref
    v_new: Ref
    k_rows: Ref
    v_rows: Ref
    starts: Ref
    tiles: Ref
    page_table: Ref
    k_pages: Ref
    v_pages: Ref
    out: Ref
    k_scales: Ref | None = None
    v_scales: Ref | None = None
    k_new_scales: Ref | None = None
    v_new_scales: Ref | None = None
    lse: Ref | None = None


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What a block allots, see `gpu_plan.scratch`.

    Attributes:
      q_rows: [W, 64, d], queries as they come, and later results as they go.
      q_tile: [W, 64, d], queries as the tensor cores read them.
      k_ring, v_ring: [N, B, d].
      k_write, v_write: [write_rows, write_pad, d], new rows on their way into the pages.
      q_ready: barriers [W]: queries are in q_rows.
      k_full, v_full: barriers [N]: the buffer holds a block.
      k_edges_full, v_edges_full: barriers: the buffer holds a block seen in part.
      k_consumed, v_consumed: barriers [N]: all compute warpgroups have read the buffer.
      turn: barrier by which two compute warpgroups take turns.
      write_ready: barrier: k_write and v_write are filled.
      k_ring_scales, v_ring_scales: float32 [N, B], with 8-bit pages.
      k_wide, v_wide: bfloat16 [wide_keys, B, d] and [B, d], likewise: a block as the tensor cores read it.
      out_rows: float32 [W, 64, d], with several splits.
      lse_rows: float32 [64], likewise.
    """

    q_rows: Ref
    q_tile: Ref
    k_ring: Ref
    v_ring: Ref
    k_write: Ref
    v_write: Ref
    q_ready: Ref
    k_full: Ref
    v_full: Ref
    k_edges_full: Ref
    v_edges_full: Ref
    k_consumed: Ref
    v_consumed: Ref
    turn: Ref
    write_ready: Ref
    k_ring_scales: Ref | None = None
    v_ring_scales: Ref | None = None
    k_wide: Ref | None = None
    v_wide: Ref | None = None
    out_rows: Ref | None = None
    lse_rows: Ref | None = None
