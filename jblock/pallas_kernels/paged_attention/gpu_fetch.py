"""What the memory warpgroup of the Hopper kernel does: it brings keys and values, and writes the new ones.

Keys and values arrive by TMA through a ring of shared memory buffers, new ones from the call's own arrays.
A block that is seen whole arrives by one copy a page, on the barrier that the compute warpgroups wait for.
One warp has them made: a copy takes half the arrivals of a whole warpgroup's so. A block that is seen in part
comes in runs of 16 keys on a barrier of its own, which the memory warpgroup awaits before it passes the block
on. The tile's new rows are stored into the pages as soon as the last block is on its way, to slots that no
block reads as cached (and, of 8-bit pages, which come whole, once this block has read them).

Values of 8 bits arrive as they are, their scales by copies of their own beside them, which the same barriers
count; the compute warpgroups widen them, see to what is not seen, and scale. So their pages are read whole.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention import gpu_walk
from jblock.pallas_kernels.paged_attention.gpu_plan import ROWS, Plan
from jblock.pallas_kernels.paged_attention.gpu_refs import Arrays, Ref, Scratch

Int = Any
"""A traced int32 scalar, or a Python int."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Which keys a block visits.

    Attributes:
      walk: of its tile.
      begin: first of its steps.
      steps: how many it has.
      seq: the tile's sequence.
      start: row of the sequence's first new token in k_new and v_new.
      head: KV head.
    """

    walk: gpu_walk.Walk
    begin: Int
    steps: Int
    seq: Int
    start: Int
    head: Int


@dataclasses.dataclass(frozen=True)
class _Way:
    """Where keys, or values, come from and go to: fields of Arrays and Scratch, less their k_ or v_."""

    new: Ref
    pages: Ref
    new_scales: Ref | None
    scales: Ref | None
    ring: Ref
    ring_scales: Ref | None
    full: Ref
    edges_full: Ref
    consumed: Ref


def _ways(a: Arrays, s: Scratch) -> tuple[_Way, _Way]:
    k = _Way(
        new=a.k_new,
        pages=a.k_pages,
        new_scales=a.k_new_scales,
        scales=a.k_scales,
        ring=s.k_ring,
        ring_scales=s.k_ring_scales,
        full=s.k_full,
        edges_full=s.k_edges_full,
        consumed=s.k_consumed,
    )
    v = _Way(
        new=a.v_new,
        pages=a.v_pages,
        new_scales=a.v_new_scales,
        scales=a.v_scales,
        ring=s.v_ring,
        ring_scales=s.v_ring_scales,
        full=s.v_full,
        edges_full=s.v_edges_full,
        consumed=s.v_consumed,
    )
    return k, v


class Fetcher:
    """Brings the keys and values of a tile's steps."""

    def __init__(self, plan: Plan, arrays: Arrays, scratch: Scratch, tile: Tile):
        self.plan, self.arrays, self.tile = plan, arrays, tile
        self.k, self.v = _ways(arrays, scratch)

    def fetch(self) -> None:
        """Sends for all steps, as the rings have room."""
        lax.fori_loop(0, self.tile.steps, self._step, self._pages(0))

    def drain(self, first: Int, end: Int) -> None:
        """Waits until the buffers of these steps have been read: before a block ends, all must have been."""
        stages, steps = self.plan.stages, self.tile.steps

        @pl.loop(jnp.maximum(steps - stages, first), end)
        def _drain(i: Int) -> None:
            plgpu.barrier_wait(self.k.consumed.at[lax.rem(i, stages)])
            plgpu.barrier_wait(self.v.consumed.at[lax.rem(i, stages)])

    def _step(self, i: Int, ids: tuple[Int, ...]) -> tuple[Int, ...]:
        """Sends for step i, whose page ids are known; returns the next one's."""
        plan, k, v = self.plan, self.k, self.v
        # The next step's page ids are on their way while this step waits for room.
        next_ids = self._pages(i + 1)
        block, slot = self._block(i), lax.rem(i, plan.stages)
        in_part = (block.head > 0) | (block.tail < plan.block_kv)
        cached, new = block.is_new == 0, block.is_new == 1
        # What nobody sees of a block's values has to be zeros, of new ones too; keys are masked.
        k_apart = in_part & cached & (not plan.scaled)
        v_apart = in_part & (not plan.scaled)
        for way, is_apart in ((k, k_apart), (v, v_apart)):
            pl.when(i >= plan.stages)(functools.partial(plgpu.barrier_wait, way.consumed.at[slot]))
            full = way.full.at[slot]

            @pl.when(new if way is k else new & jnp.logical_not(is_apart))
            def _new(way: _Way = way, full: Ref = full) -> None:
                hopper.by_one_warp(lambda: self._from_new(way, full, plan.arrivals, block, slot))

            @pl.when(cached & jnp.logical_not(is_apart))
            def _whole(way: _Way = way, full: Ref = full) -> None:
                hopper.by_one_warp(lambda: self._from_pages(way, full, block, ids, slot))

            if plan.scaled:
                continue

            @pl.when(cached & is_apart)
            def _edges(way: _Way = way) -> None:
                hopper.by_one_warp(lambda: self._edges_from_pages(way, block, ids, slot))

            if way is v:

                @pl.when(new & is_apart)
                def _new_apart() -> None:
                    hopper.by_one_warp(
                        lambda: self._from_new(v, v.edges_full, plan.edges, block, slot)
                    )

        if not plan.scaled:
            pl.when(k_apart)(functools.partial(self._pass_on, k, slot))
            pl.when(v_apart)(functools.partial(self._clear_unseen, v, block, slot))
        return next_ids

    def _block(self, i: Int) -> gpu_walk.Block:
        return gpu_walk.block_at(self.tile.walk, self.tile.begin + i, block_kv=self.plan.block_kv)

    def _pages(self, i: Int) -> tuple[Int, ...]:
        """Page ids of the pieces of step i."""
        plan, table = self.plan, self.arrays.page_table
        at, last_page = self._block(i).position, table.shape[1] - 1
        logical = (lax.div(at + p * plan.piece, plan.page_size) for p in range(plan.pieces))
        return tuple(table[self.tile.seq, jnp.minimum(p, last_page)] for p in logical)

    def _first_in_page(self, block: gpu_walk.Block) -> Int:
        return lax.rem(block.position, self.plan.page_size) if self.plan.pieces == 1 else 0

    def _from_new(
        self, way: _Way, ready: Ref, arrivals: int, block: gpu_walk.Block, slot: Int
    ) -> None:
        """From the call's own rows, on a barrier of so many arrivals."""
        first = self.tile.start + block.position - self.tile.walk.cached
        plgpu.copy_gmem_to_smem(
            way.new.at[pl.ds(first, self.plan.new_piece), self.tile.head],
            way.ring.at[slot, pl.ds(0, self.plan.new_piece)],
            ready,
        )
        if way.new_scales is not None and way.ring_scales is not None:
            scales = way.new_scales.at[self.tile.head, pl.ds(first, self.plan.block_kv)]
            plgpu.copy_gmem_to_smem(scales, way.ring_scales.at[slot], ready)
            arrivals -= 1
        for _ in range(arrivals - 1):
            plgpu.barrier_arrive(ready)

    def _from_pages(
        self, way: _Way, ready: Ref, block: gpu_walk.Block, ids: tuple[Int, ...], slot: Int
    ) -> None:
        """One copy a page, and one of its scales; a page that nobody sees arrives without being read."""
        plan, head, inside = self.plan, self.tile.head, self._first_in_page(block)
        kinds = [(way.pages, way.ring)]
        if way.scales is not None:
            kinds.append((way.scales, way.ring_scales))
        for i, page in enumerate(ids):
            rows = pl.ds(i * plan.piece, plan.piece)
            read = gpu_walk.piece_is_read(block, i * plan.piece, plan.piece)
            for source, ring in kinds:
                piece, to = source.at[page, head, pl.ds(inside, plan.piece)], ring.at[slot, rows]
                pl.when(read)(functools.partial(plgpu.copy_gmem_to_smem, piece, to, ready))
                pl.when(jnp.logical_not(read))(functools.partial(plgpu.barrier_arrive, ready))

    def _edges_from_pages(
        self, way: _Way, block: gpu_walk.Block, ids: tuple[Int, ...], slot: Int
    ) -> None:
        """A copy for each run of 16 keys that somebody sees."""
        plan, inside = self.plan, self._first_in_page(block)
        for at in range(0, plan.block_kv, plan.edge):
            page, offset = ids[at // plan.piece], at % plan.piece
            read = gpu_walk.piece_is_read(block, at, plan.edge)
            run = way.pages.at[page, self.tile.head, pl.ds(inside + offset, plan.edge)]
            to = way.ring.at[slot, pl.ds(at, plan.edge)]
            pl.when(read)(functools.partial(plgpu.copy_gmem_to_smem, run, to, way.edges_full))
            pl.when(jnp.logical_not(read))(functools.partial(plgpu.barrier_arrive, way.edges_full))

    def _pass_on(self, way: _Way, slot: Int) -> None:
        """Waits for a block that comes in runs, and says that it is there."""
        plgpu.barrier_wait(way.edges_full)
        plgpu.commit_smem()
        for _ in range(self.plan.arrivals):
            plgpu.barrier_arrive(way.full.at[slot])

    def _clear_unseen(self, way: _Way, block: gpu_walk.Block, slot: Int) -> None:
        """Zeros the values of a buffer that nobody sees, once it is there, and says that it is.

        Beside the values that are seen lie other sequences' rows, or whatever was in shared memory: it may be
        NaN, and 0 x NaN is NaN.
        """
        plgpu.barrier_wait(way.edges_full)
        plan, width = self.plan, hopper.swizzle_columns(self.plan.head_dim, jnp.bfloat16)
        for top in range(0, plan.block_kv, ROWS):
            key = hopper.iota((ROWS, width), 0) + top
            seen = (key >= block.head) & (key < block.tail)
            for left in range(0, plan.head_dim, width):
                part = way.ring.at[slot, top : top + ROWS, left : left + width]
                part[...] = jnp.where(seen, hopper.load(part), jnp.bfloat16(0))
        plgpu.commit_smem()
        for _ in range(plan.arrivals):
            plgpu.barrier_arrive(way.full.at[slot])


def write_new_rows(
    plan: Plan, a: Arrays, s: Scratch, tile: Tile, position: Int, row: Int, count: Int
) -> None:
    """Stores a tile's new keys and values into their pages.

    Args:
      plan, a, s: of the kernel.
      tile: whose they are.
      position: of its first new token in its sequence.
      row: of that in k_rows and v_rows.
      count: how many there are.
    """
    head = tile.head

    @pl.loop(0, gpu_walk.cdiv(count, plan.write_rows))
    def _chunk(i: Int) -> None:
        done = i * plan.write_rows
        for new, stage in ((a.k_rows, s.k_write), (a.v_rows, s.v_write)):
            if plan.write_pad == 1:
                rows = pl.ds(row + done, plan.write_rows)
                plgpu.copy_gmem_to_smem(new.at[rows, head], stage.at[:, 0], s.write_ready)
                continue
            for j in range(plan.write_rows):
                # With those behind it: TMA brings no fewer than 128 bytes.
                rows = pl.ds(row + done + j, plan.write_pad)
                plgpu.copy_gmem_to_smem(new.at[rows, head], stage.at[j], s.write_ready)
        plgpu.barrier_wait(s.write_ready)

        @pl.loop(0, jnp.minimum(count - done, plan.write_rows))
        def _row(j: Int) -> None:
            at = position + done + j
            page = a.page_table[tile.seq, lax.div(at, plan.page_size)]
            slot = pl.ds(lax.rem(at, plan.page_size), 1)
            for stage, pages in ((s.k_write, a.k_pages), (s.v_write, a.v_pages)):
                plgpu.copy_smem_to_gmem(stage.at[j, pl.ds(0, 1)], pages.at[page, head, slot])

        plgpu.wait_smem_to_gmem(0)
