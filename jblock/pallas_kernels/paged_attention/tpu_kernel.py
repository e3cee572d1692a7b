"""The Mosaic kernel of paged attention on TPU: its walk over sequences, items and blocks of pages.

One call is one program, which finds its own way from the lengths in scalar memory: no plan is made
outside. A sequence's new tokens are cut into items of `q_tiles` query tiles, which pass once over the
pages that their tokens can see, blocks of pages coming in while the one before is computed with (three
buffers; the first block of the next item comes in during the last of this one). Of the first and last
page only the tiles of cached tokens that are visible are copied. An item's new keys and values are laid
into the block that is in vector memory, and from there written to their pages while it is computed with;
a later item of the sequence waits for them.

Rows are token-major in HBM; new keys and values of many rows come head by head: a copy, which may begin
at any token and puts any head's rows one behind the other, does what would be a transposition.
`tpu_walk.py` has the copies; `tpu_softmax.py` and `tpu_many_rows.py` compute with a block.

The arrangement follows jax's and tpu-inference's ragged paged attention kernels (flat rows, double-buffered
pages, updates in the fetched block); the page layout, the write and the cut are our own.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jblock.pallas_kernels.paged_attention.tpu_refs import (
    BLOCK,
    ITEM,
    KV_BUFFERS,
    Batch,
    Pools,
    Rows,
    Scratch,
)
from jblock.pallas_kernels.paged_attention.tpu_walk import Walk


def kernel(
    batch: Batch,
    rows: Rows,
    pools_read: Pools,
    out: Any,
    pools: Pools,
    scratch: Scratch,
    *,
    compute: Any,
    **static: Any,
) -> None:
    """The whole batch. pools_read: the memory of `pools`, which is updated. compute: `FewRows` or `ManyRows`;
    the rest as of Walk."""
    del pools_read
    walk = Walk(batch=batch, rows=rows, out=out, pools=pools, scratch=scratch, **static)
    softmax = compute(walk)
    for counters in (
        scratch.turns,
        scratch.out_tokens,
        scratch.tiles_written,
        scratch.scales_written,
    ):
        for i in range(counters.shape[0]):
            counters[i] = 0
    first = walk.used_from(jnp.int32(0))

    @pl.when(first < walk.num_seqs)
    def begin_first():
        item = walk.item(first, 0)
        walk.for_rows(item, 0, lambda copy: copy.start())
        walk.fetch(item, 0, 0)

    @pl.loop(0, walk.num_seqs)
    def one_sequence(seq):
        @pl.loop(0, walk.num_items(seq))
        def one_item(number):
            _item(walk, softmax, seq, number)

    for slot in range(2):
        walk.wait_out(slot)
    for slot in range(KV_BUFFERS):
        walk.wait_written(slot)


def _item(walk: Walk, softmax: Any, seq: Any, number: Any) -> None:
    """Attends an item's tokens over all blocks that they can see."""
    scratch, item = walk.scratch, walk.item(seq, number)
    rows_slot = lax.rem(scratch.turns[ITEM], 2)
    last = number + 1 == walk.num_items(seq)
    next_seq = lax.cond(last, lambda: walk.used_from(seq + 1), lambda: seq)
    there = next_seq < walk.num_seqs
    following = walk.item(jnp.minimum(next_seq, walk.num_seqs - 1), jnp.where(last, 0, number + 1))
    walk.for_rows(item, rows_slot, lambda copy: copy.wait())
    pl.when(there)(lambda: walk.for_rows(following, 1 - rows_slot, lambda copy: copy.start()))
    softmax.begin(item, rows_slot)
    total = walk.num_blocks(item)

    @pl.loop(0, total)
    def one_block(j):
        turn = scratch.turns[BLOCK]
        scratch.turns[BLOCK] = turn + 1
        slot, next_slot = lax.rem(turn, KV_BUFFERS), lax.rem(turn + 1, KV_BUFFERS)
        more = j + 1 < total
        pl.when(more)(lambda: walk.fetch(item, j + 1, next_slot))
        pl.when((~more) & there & last)(lambda: walk.fetch(following, 0, next_slot))
        walk.for_pages(item, j, slot, lambda copy: copy.wait())
        walk.add_new(item, j, slot, rows_slot)

        # The next item of the same sequence sees what this one writes.
        @pl.when((~more) & ~last)
        def fetch_behind_writes():
            for written in range(KV_BUFFERS):
                walk.wait_written(written)
            walk.fetch(following, 0, next_slot)

        softmax.block(item, j, slot, rows_slot)

    walk.wait_out(rows_slot)
    softmax.end(item, rows_slot)
    walk.send_out(item, rows_slot)
    scratch.turns[ITEM] += 1
