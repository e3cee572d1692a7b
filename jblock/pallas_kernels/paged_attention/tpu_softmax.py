"""What the TPU kernel computes with a block of pages: online softmax (arXiv 2205.14135), in two arrangements.

`FewRows`, for decoding: scores are [rows, keys], as usual. `ManyRows`, for prefill: see `tpu_many_rows`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention.tpu_blocks import Blocks
from jblock.pallas_kernels.paged_attention.tpu_refs import LANES, Item
from jblock.pallas_kernels.paged_attention.tpu_walk import Walk

MASKED = -1e30
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What both arrangements are made for.

    Attributes:
      blocks: how the work is cut.
      kv_heads: key/value heads.
      groups: query heads of one, and what fills a tile.
      head_dim: width of a head, in whole lanes.
      tile: tokens of a register tile of the pages.
      page_size: tokens of a page.
      scaled: whether the pages have scales.
      dtype: of the products.
      sliding_window, softcap, scale: as in `api.paged_attention`.
    """

    blocks: Blocks
    kv_heads: int
    groups: int
    head_dim: int
    tile: int
    page_size: int
    scaled: bool
    dtype: Any
    sliding_window: int | None
    softcap: float | None
    scale: float

    @property
    def rows(self) -> int:
        """Of a query tile: row t * groups + g is query head g of its token t."""
        return self.blocks.q_tokens * self.groups

    @property
    def chunk(self) -> int:
        """Keys of a long product."""
        return self.blocks.chunk_pages * self.page_size

    @property
    def block(self) -> int:
        """Tokens of a block of pages."""
        return self.blocks.kv_pages * self.page_size

    def scores(self, products: jax.Array) -> jax.Array:
        """What the softmax is of, in units of log 2, of which powers are cheaper."""
        if self.softcap is None:
            return products * (self.scale * _LOG2_E)
        capped = jnp.tanh(products * (self.scale / self.softcap))
        return capped * (self.softcap * _LOG2_E)

    def seen(
        self, query: jax.Array, key: jax.Array, causal: bool = True, windowed: bool = True
    ) -> jax.Array:
        """Whether a query's position sees a key's: that it is not later (causal), nor behind the window."""
        seen = key <= query if causal else None
        if self.sliding_window is not None and windowed:
            inside = key > query - self.sliding_window
            seen = inside if seen is None else seen & inside
        assert seen is not None
        return seen

    def state(self, *shape: int) -> Any:
        """A float32 buffer of that shape for each query tile and kv head."""
        return pltpu.VMEM((self.blocks.q_tiles, self.kv_heads, *shape), jnp.float32)


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewState:
    """Of each query tile and kv head."""

    best: Any  # [rows, LANES], the same in all lanes
    total: Any  # [rows, LANES], likewise
    acc: Any  # [rows, d]


class FewRows:
    """Scores [rows, keys]; see the module."""

    def __init__(self, form: Form, walk: Walk):
        self.form, self.walk, self.state = form, walk, walk.scratch.softmax

    @staticmethod
    def scratch(form: Form) -> FewState:
        """Its buffers."""
        return FewState(
            best=form.state(form.rows, LANES),
            total=form.state(form.rows, LANES),
            acc=form.state(form.rows, form.head_dim),
        )

    def tiles(self, item: Item) -> Any:
        """Query tiles of an item."""
        return pl.cdiv(item.end - item.begin, self.form.blocks.q_tokens)

    def begin(self, item: Item, rows_slot: Any) -> None:
        """Forgets the item before; its rows are in a buffer."""
        state = self.state

        @pl.loop(0, self.tiles(item))
        def reset(u):
            state.best[u] = jnp.full(state.best.shape[1:], MASKED, jnp.float32)
            state.total[u] = jnp.zeros(state.total.shape[1:], jnp.float32)
            state.acc[u] = jnp.zeros(state.acc.shape[1:], jnp.float32)

    def block(self, item: Item, block: Any, slot: Any, rows_slot: Any) -> None:
        """Attends over a block, which is in a buffer."""
        form, walk = self.form, self.walk
        first, begin, end = valid_tiles(walk, item, block)
        chunk_tiles = form.chunk // form.tile
        chunks = lax.div(begin, chunk_tiles), pl.cdiv(end, chunk_tiles)
        clear_outside(walk, slot, begin, end, *(c * chunk_tiles for c in chunks))

        @pl.loop(*chunks)
        def one_chunk(c):
            @pl.loop(0, self.tiles(item))
            def one_tile(u):
                q_first = item.begin + u * form.blocks.q_tokens
                q_last = jnp.minimum(q_first + form.blocks.q_tokens, item.end) - 1
                k_first = first * form.tile + c * form.chunk
                needed = k_first <= q_last
                if form.sliding_window is not None:
                    needed &= k_first + form.chunk > q_first - form.sliding_window + 1
                pl.when(needed)(lambda: self._attend(u, slot, rows_slot, c, q_first, k_first))

    def _attend(self, u, slot, rows_slot, c, q_first, k_first) -> None:
        form, state, scratch = self.form, self.state, self.walk.scratch
        shape = form.rows, form.chunk
        token = lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), form.groups)
        key = k_first + lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = form.seen(q_first + token, key)
        tiles = pl.ds(c * (form.chunk // form.tile), form.chunk // form.tile)
        for h in range(form.kv_heads):
            k, v = (
                scratch.kv[slot, i, h, tiles].reshape(form.chunk, form.head_dim).astype(form.dtype)
                for i in (0, 1)
            )
            q = scratch.q[rows_slot, pl.ds(u * form.blocks.q_tokens, form.blocks.q_tokens), h]
            products = dot(q.reshape(form.rows, form.head_dim), k, 1, 1)
            if form.scaled:
                products *= self._scales(slot, c, h)
            scores = jnp.where(seen, form.scores(products), MASKED)
            old = state.best[u, h]
            best = jnp.maximum(old, scores.max(axis=1, keepdims=True))
            # A row that sees nothing of the chunk has no best yet, so the power alone would not hide it.
            weights = jnp.where(seen, jnp.exp2(scores - best[:, :1]), 0.0)
            keep = jnp.exp2(old - best)
            state.best[u, h] = best
            state.total[u, h] = state.total[u, h] * keep + weights.sum(axis=1, keepdims=True)
            if form.scaled:
                # The scale of a token not copied is whatever was there before.
                scales = self._scales(slot, c, form.kv_heads + h)
                weights = jnp.where(seen, weights * scales, 0.0)
            added = dot(weights.astype(form.dtype), v, 1, 0)
            state.acc[u, h] = state.acc[u, h] * keep[:, :1] + added

    def _scales(self, slot: Any, c: Any, row: int) -> jax.Array:
        """float32 [1, chunk]."""
        form, scales = self.form, self.walk.scratch.scales
        pages = form.blocks.chunk_pages
        parts = [
            scales[slot, c * pages + p, pl.ds(row, 1), pl.ds(0, form.page_size)]
            for p in range(pages)
        ]
        return jnp.concatenate(parts, axis=1)

    def end(self, item: Item, rows_slot: Any) -> None:
        """Lays the item's results into the buffer of results."""
        form, out = self.form, self.walk.scratch.out
        tokens = form.blocks.q_tokens

        @pl.loop(0, self.tiles(item))
        def finish(u):
            for h in range(form.kv_heads):
                total = self.state.total[u, h][:, :1]
                result = self.state.acc[u, h] / jnp.where(total > 0, total, 1.0)
                result = result.reshape(tokens, form.groups, form.head_dim).astype(out.dtype)
                out[rows_slot, pl.ds(u * tokens, tokens), h] = result


def valid_tiles(walk: Walk, item: Item, block: Any) -> tuple[Any, Any, Any]:
    """The logical tile that a block begins with, and which of its tiles hold tokens that the item sees."""
    first = walk.first_tile(item, block)
    size = walk.blocks.kv_pages * walk.page_tiles
    begin = jnp.maximum(lax.div(walk.visible_from(item), walk.tile) - first, 0)
    end = jnp.minimum(pl.cdiv(item.end, walk.tile) - first, size)
    return first, begin, end


def clear_outside(walk: Walk, slot: Any, begin: Any, end: Any, low: Any, high: Any) -> None:
    """Zeros values of tiles low .. high - 1 that are not begin .. end - 1. Their weights are 0, but 0 x
    NaN is NaN and the buffer held others' values."""
    kv = walk.scratch.kv
    zeros = jnp.zeros((walk.kv_heads, walk.tile, kv.shape[-1]), kv.dtype)

    def clear(t):
        kv[slot, 1, :, t] = zeros

    pl.loop(low, begin)(clear)
    pl.loop(end, high)(clear)


def dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """The product of two matrices over one dimension of each, in float32; float32 is not rounded."""
    return lax.dot_general(
        a,
        b,
        (((of_a,), (of_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
