"""The Mosaic kernel of paged attention on TPU. `tpu.py` says how its arrays lie.

Grid step 0 first writes the new KV: whole tiles as they are, tiles that already hold tokens by reading,
merging and writing back. Then every grid step is one item: up to `q_tiles` query tiles of one sequence,
which pass once over the pages that their tokens can see, blocks of pages coming in while the one before is
computed with (two buffers; the first block of the next item comes in during the last of this one).
Softmax is online (arXiv 2205.14135). Of the first and last page only the tiles with visible tokens are
copied, and no product is made of a half of a chunk that a tile cannot see.

The arrangement of work follows jax's and tpu-inference's ragged paged attention kernels (items over
flat rows, double-buffered pages); the page layout, the write and the cut are our own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention.tpu_blocks import Blocks

LANES = 128
_MASKED = -1e30
_Q, _KV, _OUT = 0, 1, 2  # rows of the semaphores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes:
    """Where new KV goes, one entry a destination: a tile of a page, or for scales a whole page.

    Attributes:
      count: int32 [], entries that mean something.
      seq, page, part: int32 [N], sequence, physical page and which tile of it.
      first, last: int32 [N], the tokens first .. last - 1 of the destination are new.
      begin: int32 [N], position in the sequence of the destination's first token.
      size: tokens of a destination.
    """

    count: jax.Array
    seq: jax.Array
    page: jax.Array
    part: jax.Array
    first: jax.Array
    last: jax.Array
    begin: jax.Array
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is to do.

    Attributes:
      num_items: int32 [], its grid; at least 1.
      items: int32 [N] each: sequence, first query tile, query tiles, position of the first token, and
        position after the last.
      tiles: destinations of the values.
      scales: destinations of the scales, if there are any.
    """

    num_items: jax.Array
    items: tuple[jax.Array, ...]
    tiles: Writes
    scales: Writes | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteBuffers:
    """A ring of destinations in VMEM: what is new, what was there and then is to be, and the semaphores
    of each slot."""

    new: Any
    old: Any
    read: Any
    write: Any


def kernel(
    *refs,
    num_arrays: int,
    blocks: Blocks,
    max_pages: int,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
):
    """One item, and before the first all writes.

    Refs: items (5), page table, writes (4 a page array), all in SMEM; then in HBM query tiles, new KV and
    pages as read (one each a page array), output tiles and pages as written; then the scratch.
    """
    left = iter(refs)

    def take(count):
        return [next(left) for _ in range(count)]

    item_seq, item_tile, item_tiles, item_begin, item_end = take(5)
    (page_table,) = take(1)
    write_refs = [take(4) for _ in range(num_arrays)]
    (q_hbm,) = take(1)
    new_hbm = take(num_arrays)
    take(num_arrays)  # the same memory as the outputs
    (out_hbm,) = take(1)
    pools = take(num_arrays)
    (scratch,) = take(1)
    q_buf, out_buf, kv_buf, sems = (scratch[n] for n in ("q", "out", "kv", "sems"))
    scale_buf = scratch.get("scale")
    turn = scratch["turn"]

    _, _, kv_heads, tiles, tile, d = pools[0].shape
    page_size = tiles * tile
    chunk_tiles = blocks.chunk_pages * tiles
    chunk = chunk_tiles * tile
    block_tiles = blocks.kv_pages * tiles
    rows = q_buf.shape[3]
    item, num_items = pl.program_id(0), pl.num_programs(0)

    def visible_from(i):
        """Position of the first token that item i can see."""
        if sliding_window is None:
            return 0
        return jnp.maximum(item_begin[i] - sliding_window + 1, 0)

    def first_page(i):
        return visible_from(i) // page_size

    def num_blocks(i):
        return pl.cdiv(pl.cdiv(item_end[i], page_size) - first_page(i), blocks.kv_pages)

    def for_pages(i, j, slot, act):
        """Does `act` to the copies of block j of item i."""
        first = first_page(i) + j * blocks.kv_pages
        count = jnp.minimum(pl.cdiv(item_end[i], page_size) - first, blocks.kv_pages)

        @pl.loop(0, count)
        def one_page(p):
            page = page_table[item_seq[i] * max_pages + first + p]
            skipped = (first + p) * tiles
            begin = jnp.maximum(visible_from(i) // tile - skipped, 0)
            size = jnp.minimum(pl.cdiv(item_end[i], tile) - skipped, tiles) - begin
            act(
                pltpu.make_async_copy(
                    pools[0].at[page, :, :, pl.ds(begin, size)],
                    kv_buf.at[slot, :, :, pl.ds(p * tiles + begin, size)],
                    sems.at[_KV, slot],
                )
            )
            if scale_buf is not None:
                act(
                    pltpu.make_async_copy(
                        pools[1].at[page], scale_buf.at[slot, p], sems.at[_KV, slot]
                    )
                )

    def q_copy(i):
        count, slot = item_tiles[i], i % 2
        return pltpu.make_async_copy(
            q_hbm.at[pl.ds(item_tile[i], count)],
            q_buf.at[slot, pl.ds(0, count)],
            sems.at[_Q, slot],
        )

    def out_copy(i):
        count, slot = item_tiles[i], i % 2
        return pltpu.make_async_copy(
            out_buf.at[slot, pl.ds(0, count)],
            out_hbm.at[pl.ds(item_tile[i], count)],
            sems.at[_OUT, slot],
        )

    @pl.when(item == 0)
    def begin_all():
        for array, (refs_of, new, pool) in enumerate(zip(write_refs, new_hbm, pools, strict=True)):
            _write(refs_of, new, pool, scratch["writes"][array], is_scale=array == 1)
        turn[0] = 0
        q_copy(0).start()
        for_pages(0, 0, 0, lambda copy: copy.start())

    q_slot = item % 2
    begin, end, count = item_begin[item], item_end[item], item_tiles[item]
    q_copy(item).wait()

    @pl.when(item + 1 < num_items)
    def bring_next_queries():
        q_copy(item + 1).start()

    best_ref, total_ref, acc_ref = scratch["best"], scratch["total"], scratch["acc"]

    @pl.loop(0, count)
    def reset(u):
        best_ref[u] = jnp.full(best_ref.shape[1:], _MASKED, jnp.float32)
        total_ref[u] = jnp.zeros(total_ref.shape[1:], jnp.float32)
        acc_ref[u] = jnp.zeros(acc_ref.shape[1:], jnp.float32)

    # A tile that sees half of a chunk, at the diagonal or the window's edge, computes with that half alone.
    # Scales lie along lanes, which are not cut inside a page.
    halves = 2 if (chunk_tiles if scale_buf is None else blocks.chunk_pages) % 2 == 0 else 1
    half_tiles = chunk_tiles // halves
    half = half_tiles * tile

    def attend(u, slot, first_half, num, block_begin):
        """One query tile over `num` halves of chunks of a block (static), all heads."""
        q_first = begin + u * blocks.q_tokens
        k_first = block_begin + first_half * half
        shape = (rows, num * half)
        token = lax.broadcasted_iota(jnp.int32, shape, 0) & (blocks.q_tokens - 1)
        distance = (q_first + token) - (k_first + lax.broadcasted_iota(jnp.int32, shape, 1))
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        for h in range(kv_heads):
            k, v = (
                kv_buf[slot, i, h, pl.ds(first_half * half_tiles, num * half_tiles)]
                .reshape(num * half, d)
                .astype(q_buf.dtype)
                for i in (0, 1)
            )
            scores = _dot(q_buf[q_slot, u, h], k, contract=1) * scale
            if scale_buf is not None:
                scores *= scales(slot, first_half, num, h)
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(seen, scores, _MASKED)
            old = best_ref[u, h]
            best = jnp.maximum(old, scores.max(axis=1, keepdims=True))
            # A row that sees nothing of the chunk has no best yet, so exp alone would not hide it.
            weights = jnp.where(seen, jnp.exp(scores - best[:, :1]), 0.0)
            keep = jnp.exp(old - best)
            best_ref[u, h] = best
            total_ref[u, h] = total_ref[u, h] * keep + weights.sum(axis=1, keepdims=True)
            if scale_buf is not None:
                # The scale of a token not copied is whatever was there before.
                weights = jnp.where(
                    seen, weights * scales(slot, first_half, num, kv_heads + h), 0.0
                )
            added = _dot(weights.astype(v.dtype), v, contract=0)
            acc_ref[u, h] = acc_ref[u, h] * keep[:, :1] + added

    def scales(slot, first_half, num, row):
        """float32 [1, num * half]."""
        pages = blocks.chunk_pages // halves
        return jnp.concatenate(
            [
                scale_buf[slot, first_half * pages + p, pl.ds(row, 1), pl.ds(0, page_size)]
                for p in range(num * pages)
            ],
            axis=1,
        )

    total_blocks = num_blocks(item)

    @pl.loop(0, total_blocks)
    def one_block(j):
        slot = turn[0]
        turn[0] = 1 - slot

        @pl.when(j + 1 < total_blocks)
        def bring_next_block():
            for_pages(item, j + 1, 1 - slot, lambda copy: copy.start())

        @pl.when((j + 1 == total_blocks) & (item + 1 < num_items))
        def bring_next_item():
            for_pages(item + 1, 0, 1 - slot, lambda copy: copy.start())

        for_pages(item, j, slot, lambda copy: copy.wait())
        first_tile = (first_page(item) + j * blocks.kv_pages) * tiles
        valid_from = jnp.maximum(visible_from(item) // tile - first_tile, 0)
        valid_to = jnp.minimum(pl.cdiv(end, tile) - first_tile, block_tiles)
        chunks_from, chunks_to = valid_from // chunk_tiles, pl.cdiv(valid_to, chunk_tiles)

        # Weights of what was not copied are 0, but 0 x NaN is NaN and the buffer held others' values.
        def clear(t):
            kv_buf[slot, 1, :, t] = jnp.zeros((kv_heads, tile, d), kv_buf.dtype)

        pl.loop(chunks_from * chunk_tiles, valid_from)(clear)
        pl.loop(valid_to, chunks_to * chunk_tiles)(clear)
        block_begin = first_tile * tile

        @pl.loop(chunks_from, chunks_to)
        def one_chunk(c):
            @pl.loop(0, count)
            def one_tile(u):
                q_first = begin + u * blocks.q_tokens
                q_last = jnp.minimum(q_first + blocks.q_tokens, end) - 1
                k_first = block_begin + c * chunk
                low_end, high_begin = k_first + half, k_first + chunk - half
                low, high = k_first <= q_last, high_begin <= q_last
                if sliding_window is not None:
                    lowest = q_first - sliding_window + 1
                    low, high = low & (low_end > lowest), high & (k_first + chunk > lowest)

                @pl.when(low & high)
                def see_all():
                    attend(u, slot, c * halves, halves, block_begin)

                if halves == 2:

                    @pl.when(low != high)
                    def see_half():
                        attend(u, slot, c * 2 + high.astype(jnp.int32), 1, block_begin)

    @pl.when(item >= 2)
    def free_output():
        out_copy(item - 2).wait()

    @pl.loop(0, count)
    def finish(u):
        for h in range(kv_heads):
            total = total_ref[u, h][:, :1]
            out = acc_ref[u, h] / jnp.where(total > 0, total, 1.0)
            out_buf[q_slot, u, h] = out.astype(out_buf.dtype)

    out_copy(item).start()

    @pl.when(item + 1 == num_items)
    def end_all():
        @pl.when(item >= 1)
        def end_previous():
            out_copy(item - 1).wait()

        out_copy(item).wait()


def _write(writes: list, new_hbm: Any, pool: Any, ring: WriteBuffers, *, is_scale: bool) -> None:
    """Brings every destination up to date, several in flight. Ends when all are written."""
    count, page, part, first = writes
    depth = ring.new.shape[0]
    ahead = depth // 2

    def place(i):
        return pool.at[page[i]] if is_scale else pool.at[page[i], :, :, part[i]]

    def copy_new(i):
        slot = i % depth
        return pltpu.make_async_copy(new_hbm.at[i], ring.new.at[slot], ring.read.at[slot])

    def copy_old(i):
        slot = i % depth
        return pltpu.make_async_copy(place(i), ring.old.at[slot], ring.read.at[slot])

    def copy_back(i):
        slot = i % depth
        return pltpu.make_async_copy(ring.old.at[slot], place(i), ring.write.at[slot])

    total = count[0]

    @pl.loop(0, total + ahead)
    def turn(i):
        @pl.when(i < total)
        def bring():
            @pl.when(i >= depth)
            def free_slot():
                copy_back(i - depth).wait()

            copy_new(i).start()

            @pl.when(first[i] > 0)
            def bring_old():
                copy_old(i).start()

        @pl.when(i >= ahead)
        def send():
            done = i - ahead
            slot = done % depth
            copy_new(done).wait()

            pl.when(first[done] > 0)(lambda: copy_old(done).wait())
            # Along lanes for scales, along the rows of a tile for values.
            axis = ring.old.ndim - (2 if is_scale else 3)
            at = lax.broadcasted_iota(jnp.int32, ring.old.shape[1:], axis)
            # By way of float32, which holds every value of the narrow types exactly.
            old, new = (ring.old[slot].astype(jnp.float32), ring.new[slot].astype(jnp.float32))
            if new.shape != old.shape:  # one token
                new = jnp.where(at == first[done], new, 0.0)
            merged = jnp.where(at < first[done], old, new)
            ring.old[slot] = merged.astype(ring.old.dtype)

            copy_back(done).start()

    @pl.loop(jnp.maximum(total - depth, 0), total)
    def drain(i):
        copy_back(i).wait()


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """a [m, n] by dimension `contract` of b, in float32; float32 operands are not rounded."""
    return lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
