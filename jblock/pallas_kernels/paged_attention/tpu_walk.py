"""The TPU kernel's way through a batch: which items and blocks of pages there are, and the copies between HBM
and vector memory; see `tpu_kernel`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention.tpu_blocks import Blocks
from jblock.pallas_kernels.paged_attention.tpu_refs import Batch, Item, Pools, Rows, Scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Where everything lies, and the copies between. Attributes are the kernel's refs and static
    arguments."""

    batch: Batch
    rows: Rows
    out: Any
    pools: Pools
    scratch: Scratch
    blocks: Blocks
    max_pages: int
    sliding_window: int | None

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.pools.pages.shape[4]

    @property
    def page_tiles(self) -> int:
        """Tiles of a page."""
        return self.pools.pages.shape[3]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.page_tiles * self.tile

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.pools.pages.shape[2]

    @property
    def item_tokens(self) -> int:
        """Tokens of an item."""
        return self.blocks.q_tokens * self.blocks.q_tiles

    @property
    def num_seqs(self) -> int:
        """S, unused sequences included."""
        return self.batch.q_lens.shape[0]

    # What comes from outside, held within the arrays, since no copy is checked.

    def new_tokens(self, seq: Any) -> Any:
        """New tokens of a sequence; 0: it is unused, or its rows or tokens are not all within the arrays."""
        row, new, length = (
            a[seq] for a in (self.batch.row_starts, self.batch.q_lens, self.batch.kv_lens)
        )
        whole = (row >= 0) & (row + new <= self.rows.q.shape[0])
        whole &= (new <= length) & (length <= self.max_pages * self.page_size)
        return jnp.where(whole, jnp.maximum(new, 0), 0)

    def page(self, seq: Any, logical: Any) -> Any:
        """Physical page of a sequence's logical one; 0, the empty page, which is only read: there is none."""
        page = self.batch.page_table[seq * self.max_pages + logical]
        return jnp.where((page >= 0) & (page < self.pools.pages.shape[0]), page, 0)

    # Items.

    def item(self, seq: Any, number: Any) -> Item:
        """The sequence's item of that number."""
        begin = self.batch.kv_lens[seq] - self.batch.q_lens[seq] + number * self.item_tokens
        return Item(
            seq=seq,
            begin=begin,
            end=jnp.minimum(begin + self.item_tokens, self.batch.kv_lens[seq]),
        )

    def num_items(self, seq: Any) -> Any:
        """Items of a sequence; 0: it is unused."""
        return pl.cdiv(self.new_tokens(seq), self.item_tokens)

    def used_from(self, seq: Any) -> Any:
        """The first sequence with new tokens that is not before `seq`; num_seqs: there is none."""

        def tokens(seq: Any) -> Any:
            return self.new_tokens(jnp.minimum(seq, self.num_seqs - 1))

        return lax.while_loop(
            lambda state: (state[0] < self.num_seqs) & (state[1] == 0),
            lambda state: (state[0] + 1, tokens(state[0] + 1)),
            (seq, tokens(seq)),
        )[0]

    def visible_from(self, item: Item) -> Any:
        """Position of the first token that the item can see."""
        if self.sliding_window is None:
            return 0
        return jnp.maximum(item.begin - self.sliding_window + 1, 0)

    def first_page(self, item: Item) -> Any:
        """Logical page of that token."""
        return lax.div(self.visible_from(item), self.page_size)

    def num_blocks(self, item: Item) -> Any:
        """Blocks of pages that the item can see."""
        pages = pl.cdiv(item.end, self.page_size) - self.first_page(item)
        return pl.cdiv(pages, self.blocks.kv_pages)

    def first_tile(self, item: Item, block: Any) -> Any:
        """Logical tile that a block begins with."""
        return (self.first_page(item) + block * self.blocks.kv_pages) * self.page_tiles

    # Copies of pages.

    def for_pages(self, item: Item, block: Any, slot: Any, act: Any) -> None:
        """Does `act` to the copies of what is cached of a block."""
        first = self.first_page(item) + block * self.blocks.kv_pages
        cached = pl.cdiv(item.begin, self.page_size) - first

        @pl.loop(0, jnp.minimum(cached, self.blocks.kv_pages))
        def one_page(p):
            page = self.page(item.seq, first + p)
            skipped = (first + p) * self.page_tiles
            begin = jnp.maximum(lax.div(self.visible_from(item), self.tile) - skipped, 0)
            end = jnp.minimum(pl.cdiv(item.begin, self.tile) - skipped, self.page_tiles)
            size = jnp.maximum(end - begin, 0)
            at = pl.ds(p * self.page_tiles + begin, size)
            copy = pltpu.make_async_copy(
                self.pools.pages.at[page, :, :, pl.ds(begin, size)],
                self.scratch.kv.at[slot, :, :, at],
                self.scratch.kv_sems.at[slot],
            )
            pl.when(size > 0)(lambda: act(copy))
            if self.pools.scales is not None:
                act(
                    pltpu.make_async_copy(
                        self.pools.scales.at[page],
                        self.scratch.scales.at[slot, p],
                        self.scratch.kv_sems.at[slot],
                    )
                )

    def fetch(self, item: Item, block: Any, slot: Any) -> None:
        """Has a block's cached tokens brought, once what the buffer held is written."""
        self.wait_written(slot)
        self.for_pages(item, block, slot, lambda copy: copy.start())

    # Copies of rows.

    def for_rows(self, item: Item, slot: Any, act: Any) -> None:
        """Does `act` to the copies of an item's rows."""
        offset = self.batch.kv_lens[item.seq] - self.batch.q_lens[item.seq]
        count = item.end - item.begin
        source = pl.ds(self.batch.row_starts[item.seq] + item.begin - offset, count)
        sem = self.scratch.q_sems.at[slot]
        into = pl.ds(lax.rem(item.begin, self.tile), count)
        queries = self.scratch.q.at[slot, pl.ds(0, count)]
        act(pltpu.make_async_copy(self.rows.q.at[source], queries, sem))
        for i, new in enumerate((self.rows.k, self.rows.v)):
            if not self.blocks.many_rows:
                rows = self.scratch.new.at[slot, i, into]
                act(pltpu.make_async_copy(new.at[source], rows, sem))
                continue
            for h in range(self.kv_heads):
                rows = self.scratch.new.at[slot, i, h, into]
                act(pltpu.make_async_copy(new.at[source, h], rows, sem))
        if self.rows.scales is not None:
            into = pl.ds(lax.rem(item.begin, self.page_size), count)
            scales = self.scratch.new_scales.at[slot, into]
            act(pltpu.make_async_copy(self.rows.scales.at[source], scales, sem))

    def for_out(self, first_row: Any, count: Any, slot: Any, act: Any) -> None:
        """Does `act` to the copies of results."""
        act(
            pltpu.make_async_copy(
                self.scratch.out.at[slot, pl.ds(0, count)],
                self.out.at[pl.ds(first_row, count)],
                self.scratch.out_sems.at[slot],
            )
        )

    def send_out(self, item: Item, slot: Any) -> None:
        """Has an item's results written."""
        offset = self.batch.kv_lens[item.seq] - self.batch.q_lens[item.seq]
        row = self.batch.row_starts[item.seq] + item.begin - offset
        self.for_out(row, item.end - item.begin, slot, lambda copy: copy.start())
        self.scratch.out_tokens[slot] = item.end - item.begin

    def wait_out(self, slot: Any) -> None:
        """Until the results that a buffer held are written."""
        count = self.scratch.out_tokens[slot]
        pl.when(count > 0)(lambda: self.for_out(0, count, slot, lambda copy: copy.wait()))
        self.scratch.out_tokens[slot] = 0

    # New keys and values.

    def add_new(self, item: Item, block: Any, slot: Any, rows_slot: Any) -> None:
        """Lays what is new of a block into it, and has it written to its pages."""
        first, size = self.first_tile(item, block), self.blocks.kv_pages * self.page_tiles
        begin = jnp.maximum(lax.div(item.begin, self.tile), first)
        end = jnp.minimum(pl.cdiv(item.end, self.tile), first + size)

        @pl.loop(begin, end)
        def one_tile(t):
            self._merge_tile(item, t, t - first, slot, rows_slot)
            page = self.page(item.seq, lax.div(t, self.page_tiles))

            @pl.when(page > 0)
            def write():
                self._tile_write(page, lax.rem(t, self.page_tiles), t - first, slot).start()
                self.scratch.tiles_written[slot] += 1

        if self.pools.scales is not None:
            self._add_scales(item, block, slot, rows_slot)

    def _merge_tile(self, item: Item, tile: Any, at: Any, slot: Any, rows_slot: Any) -> None:
        d = self.pools.pages.shape[5]
        position = tile * self.tile + lax.broadcasted_iota(jnp.int32, (self.tile, d), 0)
        kv = self.scratch.kv
        for i in (0, 1):
            for h in range(self.kv_heads):
                new = jnp.where(
                    position < item.end, self._new_rows(item, tile, rows_slot, i, h), 0.0
                )
                # By way of float32, which holds every value of the narrow types exactly.
                old = kv[slot, i, h, at].astype(jnp.float32)
                kv[slot, i, h, at] = jnp.where(position < item.begin, old, new).astype(kv.dtype)

    def _new_rows(self, item: Item, tile: Any, rows_slot: Any, i: int, h: int) -> jax.Array:
        """A head's new keys (i 0) or values of a tile, float32 [tile, d]; [1, d] where there is but one."""
        new, d = self.scratch.new, self.pools.pages.shape[5]
        if self.item_tokens == 1 and not self.blocks.many_rows:
            return new[rows_slot, i, lax.rem(item.begin, self.tile), h]
        source = pl.ds((tile - lax.div(item.begin, self.tile)) * self.tile, self.tile)
        rows = (
            new[rows_slot, i, h, source] if self.blocks.many_rows else new[rows_slot, i, source, h]
        )
        return rows.reshape(self.tile, d)

    def _tile_write(self, page: Any, tile: Any, at: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(
            self.scratch.kv.at[slot, :, :, at],
            self.pools.pages.at[page, :, :, tile],
            self.scratch.write_sems.at[slot],
        )

    def _add_scales(self, item: Item, block: Any, slot: Any, rows_slot: Any) -> None:
        first = self.first_page(item) + block * self.blocks.kv_pages
        begin = jnp.maximum(lax.div(item.begin, self.page_size), first)
        end = jnp.minimum(pl.cdiv(item.end, self.page_size), first + self.blocks.kv_pages)
        count, size = self.pools.scales.shape[1], self.page_size

        @pl.loop(begin, end)
        def one_page(p):
            position = p * size + lax.broadcasted_iota(jnp.int32, (count, size), 1)
            source = pl.ds((p - lax.div(item.begin, size)) * size, size)
            # Tokens come along sublanes, as copies may begin at any of them, and lie along lanes.
            new = self.scratch.new_scales[rows_slot, source]
            new = new.reshape(size, new.shape[2]).T[:count]
            new = jnp.where(position < item.end, new, 0.0)
            place = self.scratch.scales.at[slot, p - first, :, pl.ds(0, size)]
            place[...] = jnp.where(position < item.begin, place[...], new)
            page = self.page(item.seq, p)

            @pl.when(page > 0)
            def write():
                self._scale_write(page, p - first, slot).start()
                self.scratch.scales_written[slot] += 1

    def _scale_write(self, page: Any, at: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(
            self.scratch.scales.at[slot, at],
            self.pools.scales.at[page],
            self.scratch.scale_sems.at[slot],
        )

    def wait_written(self, slot: Any) -> None:
        """Until what a buffer had of new keys and values is in its pages."""

        @pl.loop(0, self.scratch.tiles_written[slot])
        def one_tile(_):
            self._tile_write(0, 0, 0, slot).wait()

        self.scratch.tiles_written[slot] = 0
        if self.pools.scales is not None:

            @pl.loop(0, self.scratch.scales_written[slot])
            def one_page(_):
                self._scale_write(0, 0, slot).wait()

            self.scratch.scales_written[slot] = 0
