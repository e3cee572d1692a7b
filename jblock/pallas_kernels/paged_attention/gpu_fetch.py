"""What the memory warpgroup of the Hopper kernel does: it brings keys and values, and writes the new ones.

Keys and values arrive by TMA through a ring of shared memory buffers, new ones from the call's own arrays.
The tile's new rows are stored into the pages meanwhile, to slots that no block reads as cached.

Pages of 8 bits arrive through a ring of their own. The memory warpgroup widens and scales what has arrived,
into the ring that the compute warpgroups read, which know nothing of it. Their scales are read as they lie.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention import gpu_walk
from jblock.pallas_kernels.paged_attention.gpu_plan import ROWS, Plan


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
    begin: Any
    steps: Any
    seq: Any
    start: Any
    head: Any


@dataclasses.dataclass(frozen=True)
class _Way:
    """What keys, or values, come from and go to; fields as `gpu_kernel.body` and `gpu_plan.scratch` name
    them, None where there are none.

    Attributes:
      new, pages, scales: in device memory.
      raw, raw_full: the ring of 8-bit values.
      ring, full, free: the ring that is read.
    """

    new: Any
    pages: Any
    scales: Any
    raw: Any
    raw_full: Any
    ring: Any
    full: Any
    free: Any


def _way(refs: Any, s: Any, kind: str) -> _Way:
    names = f"{kind}_new {kind}_pages {kind}_scales", f"{kind}_raw {kind}_raw_full"
    own = f"{kind}_ring {kind}_full {kind}_free"
    found = [getattr(refs, n, None) for n in names[0].split()]
    return _Way(*found, *(getattr(s, n, None) for n in f"{names[1]} {own}".split()))


def fetch(plan: Plan, refs: Any, s: Any, tile: Tile) -> None:
    """Brings the keys and values of the tile's steps, as the rings have room."""
    walk, begin, steps, head = tile.walk, tile.begin, tile.steps, tile.head
    last_page = refs.page_table.shape[1] - 1
    k, v = _way(refs, s, "k"), _way(refs, s, "v")
    width = hopper.swizzle_columns(plan.head_dim, jnp.bfloat16)

    def block_of(i: Any) -> gpu_walk.Block:
        return gpu_walk.block_at(walk, begin + i, block_kv=plan.block_kv)

    def pages(i: Any) -> tuple[Any, ...]:
        at = block_of(i).position
        logical = (lax.div(at + p * plan.piece, plan.page_size) for p in range(plan.pieces))
        return tuple(refs.page_table[tile.seq, jnp.minimum(p, last_page)] for p in logical)

    def first_in_page(block: gpu_walk.Block) -> Any:
        return lax.rem(block.position, plan.page_size) if plan.pieces == 1 else 0

    def from_new(way: _Way, ready: Any, block: gpu_walk.Block, slot: Any) -> None:
        rows = pl.ds(tile.start + block.position - walk.cached, plan.new_piece)
        to = way.ring.at[slot, pl.ds(0, plan.new_piece)]
        plgpu.copy_gmem_to_smem(way.new.at[rows, head], to, ready)
        for _ in range(plan.arrivals - 1):
            plgpu.barrier_arrive(ready)

    def from_pages(
        source: Any, ring: Any, ready: Any, block: gpu_walk.Block, ids: Any, slot: Any
    ) -> None:
        inside = first_in_page(block)
        for i, page in enumerate(ids):
            first = i * plan.piece
            whole = (block.head <= first) & (block.tail >= first + plan.piece)

            def copy(offset: int, size: int, page: Any = page, first: int = first) -> None:
                plgpu.copy_gmem_to_smem(
                    source.at[page, head, pl.ds(inside + offset, size)],
                    ring.at[slot, pl.ds(first + offset, size)],
                    ready,
                )

            @pl.when(whole)
            def _one_copy(copy: Any = copy) -> None:
                copy(0, plan.piece)
                for _ in range(plan.piece // plan.edge - 1):
                    plgpu.barrier_arrive(ready)

            @pl.when(jnp.logical_not(whole))
            def _edges(copy: Any = copy, first: int = first) -> None:
                for offset in range(0, plan.piece, plan.edge):
                    # What nobody sees arrives without being read.
                    read = gpu_walk.piece_is_read(block, first + offset, plan.edge)
                    pl.when(read)(functools.partial(copy, offset, plan.edge))
                    pl.when(jnp.logical_not(read))(lambda: plgpu.barrier_arrive(ready))

    def seen(block: gpu_walk.Block, top: int) -> jax.Array:
        # Beside the values that are seen lie other sequences' rows, or whatever was in shared memory: it
        # may be NaN, and 0 x NaN is NaN.
        key = hopper.iota((ROWS, width), 0) + top
        return (key >= block.head) & (key < block.tail)

    def rewrite(way: _Way, slot: Any, block: gpu_walk.Block, values: Any) -> None:
        """Fills a buffer of the ring with values that are seen, zeros elsewhere, and says that it is full."""
        for top in range(0, plan.block_kv, ROWS):
            mine = seen(block, top)
            for left in range(0, plan.head_dim, width):
                part = way.ring.at[slot, top : top + ROWS, left : left + width]
                part[...] = jnp.where(mine, values(part, top, left), jnp.bfloat16(0))
        plgpu.commit_smem()
        for _ in range(plan.arrivals):
            plgpu.barrier_arrive(way.full.at[slot])

    def clear_unseen(block: gpu_walk.Block, slot: Any) -> None:
        plgpu.barrier_wait(v.full.at[plan.stages])
        rewrite(v, slot, block, lambda part, top, left: hopper.load(part))

    def widen(way: _Way, block: gpu_walk.Block, ids: Any, raw: Any, slot: Any) -> None:
        inside, scales = first_in_page(block), {}
        plgpu.barrier_wait(way.raw_full.at[raw])

        def values(part: Any, top: int, left: int) -> jax.Array:
            if top not in scales:
                at = pl.ds(inside + top % plan.piece, ROWS)
                scales[top] = hopper.load_rows(way.scales.at[ids[top // plan.piece], head, at])
            wide = hopper.load_8_bits(way.raw.at[raw, top : top + ROWS, left : left + width])
            return (wide * lax.broadcast_in_dim(scales[top], wide.shape, [0])).astype(jnp.bfloat16)

        rewrite(way, slot, block, values)

    def send_for(i: Any) -> None:
        """Has the 8-bit values of step i come, if it is a step over cached tokens."""
        block, raw = block_of(i), lax.rem(i, max(1, plan.raw_stages))

        @pl.when((i < steps) & (block.is_new == 0))
        def _send() -> None:
            ids = pages(i)
            for way in (k, v):
                from_pages(way.pages, way.raw, way.raw_full.at[raw], block, ids, raw)

    def step(i: Any, ids: tuple[Any, ...]) -> tuple[Any, ...]:
        # The next step's page ids are on their way while this step waits for room.
        next_ids = pages(i + 1)
        block = block_of(i)
        slot, raw = lax.rem(i, plan.stages), lax.rem(i, max(1, plan.raw_stages))
        partly = (block.head > 0) | (block.tail < plan.block_kv)
        for way in (k, v):
            pl.when(i >= plan.stages)(functools.partial(plgpu.barrier_wait, way.free.at[slot]))
            ready = way.full.at[slot if way is k else jnp.where(partly, plan.stages, slot)]

            @pl.when(block.is_new == 1)
            def _new(way: _Way = way, ready: Any = ready) -> None:
                from_new(way, ready, block, slot)

            @pl.when(block.is_new == 0)
            def _cached(way: _Way = way, ready: Any = ready) -> None:
                if plan.scaled:
                    widen(way, block, ids, raw, slot)
                else:
                    from_pages(way.pages, way.ring, ready, block, ids, slot)

        if plan.scaled:
            send_for(i + plan.raw_stages)
            partly &= block.is_new == 1
        pl.when(partly)(lambda: clear_unseen(block, slot))
        return next_ids

    for i in range(plan.raw_stages):
        send_for(i)
    lax.fori_loop(0, steps, step, pages(0))

    @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(s.k_free.at[lax.rem(i, plan.stages)])
        plgpu.barrier_wait(s.v_free.at[lax.rem(i, plan.stages)])


def write_new_rows(
    plan: Plan, refs: Any, s: Any, position: Any, seq: Any, row: Any, count: Any, head: Any
) -> None:
    """Stores the tile's new keys and values into their pages."""

    @pl.loop(0, gpu_walk.cdiv(count, plan.write_rows))
    def _chunk(i: Any) -> None:
        done = i * plan.write_rows
        for new, stage in ((refs.k_rows, s.k_write), (refs.v_rows, s.v_write)):
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
        def _row(j: Any) -> None:
            at = position + done + j
            page = refs.page_table[seq, lax.div(at, plan.page_size)]
            slot = pl.ds(lax.rem(at, plan.page_size), 1)
            for stage, pages in ((s.k_write, refs.k_pages), (s.v_write, refs.v_pages)):
                plgpu.copy_smem_to_gmem(stage.at[j, pl.ds(0, 1)], pages.at[page, head, slot])

        plgpu.wait_smem_to_gmem(0)
