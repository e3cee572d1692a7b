"""Online softmax over a block of pages for many rows: scores are [keys, rows].

So the keys stream through the matrix unit past a tile of queries, a row's statistics take a lane each and
not a register of their own, and its largest score is found by comparing registers, without moving anything
across lanes. Values are transposed for that once a block, whatever number of query tiles it serves.

Long chunks of keys that all rows of a tile see need no mask; what is left goes in strips of 128 keys, those
at the window's edge and those at the diagonal apart, each with its one mask: two take too many registers.
Scores and weights pass through vector memory on purpose, two buffers of each: the products of one head then
overlap with the exponentials of another, and no register is spilled.

Weights are summed by the matrix unit, over rows of ones behind the values.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention.tpu_refs import LANES, Item
from jblock.pallas_kernels.paged_attention.tpu_softmax import (
    MASKED,
    FewRows,
    Form,
    clear_outside,
    dot,
    valid_tiles,
)

_SUBLANES = 8
_NONE_SEEN = (
    MASKED / 2
)  # a row's best before it sees a key: so far over a masked score that its power is 0
_ZEROS = 4  # of scores when the best is sought and when weights are made, of weights, and of sums
_SUMMED = 40  # rows of the transposed sum that are added to at a time
_ONES = 16  # a register tile of bfloat16
_TOGETHER = 8  # heads at most that stand in one stretch of code; of more, registers are spilled
_AHEAD = 1  # heads whose scores are made while the values of one are added; of more, registers are spilled


class Masks(NamedTuple):
    """Which keys are hidden from some rows, see `Form.seen`."""

    causal: bool
    windowed: bool


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyState:
    """Of each query tile and kv head, then of the present head, then of the present block."""

    best: Any  # [1, rows]
    acc: Any  # [d + SUBLANES, rows]; in the rows behind d the sum of the weights
    scores: Any  # AHEAD + 1 of float32 [2, chunk, rows], of which the first half is used
    weights: Any  # as many of the products' dtype, likewise
    zeros: Any  # int32 [ZEROS + TOGETHER] in SMEM, 0: see `ManyRows._attend_heads`
    tokens: Any  # int32 [1, 1, rows], each row's token of its tile
    queries: Any  # [q_tiles, kv_heads, rows, d], the item's without gaps
    keys: Any  # [kv_heads, block, d] widened; None: they need not be
    values: Any  # [kv_heads, d + ONES, block], in the rows behind d ones


class ManyRows(FewRows):
    """The arrangement; see the module."""

    @staticmethod
    def scratch(form: Form) -> ManyState:  # type: ignore[override]
        """Its buffers."""
        kv_heads, d, block = form.kv_heads, form.head_dim, form.block
        return ManyState(
            best=form.state(1, form.rows),
            acc=form.state(d + _SUBLANES, form.rows),
            scores=[pltpu.VMEM((2, form.chunk, form.rows), jnp.float32)] * (_AHEAD + 1),
            weights=[pltpu.VMEM((2, form.chunk, form.rows), form.dtype)] * (_AHEAD + 1),
            zeros=pltpu.SMEM((_ZEROS + _TOGETHER,), jnp.int32),
            tokens=pltpu.VMEM((1, 1, form.rows), jnp.int32),
            queries=pltpu.VMEM((form.blocks.q_tiles, kv_heads, form.rows, d), form.dtype),
            keys=pltpu.VMEM((kv_heads, block, d), form.dtype) if form.scaled else None,
            values=pltpu.VMEM((kv_heads, d + _ONES, block), form.dtype),
        )

    @property
    def strip(self) -> int:
        """Keys that are masked together: whole lanes of transposed values, where chunks are."""
        return math.gcd(self.form.chunk, LANES)

    def begin(self, item: Item, rows_slot: Any) -> None:
        """Forgets the item before, and lays this one's queries without gaps."""
        for i in range(self.state.zeros.shape[0]):
            self.state.zeros[i] = 0
        form, state, queries = self.form, self.state, self.walk.scratch.q
        tokens = form.blocks.q_tokens
        row = lax.broadcasted_iota(jnp.int32, (1, form.rows), 1)
        state.tokens[0] = lax.div(row, form.groups)

        @pl.loop(0, self.tiles(item))
        def lay(u):
            state.best[u] = jnp.full(state.best.shape[1:], _NONE_SEEN, jnp.float32)
            state.acc[u] = jnp.zeros(state.acc.shape[1:], jnp.float32)
            for h in range(form.kv_heads):
                q = queries[rows_slot, pl.ds(u * tokens, tokens), h]
                state.queries[u, h] = q.reshape(form.rows, form.head_dim)

    def block(self, item: Item, block: Any, slot: Any, rows_slot: Any) -> None:
        """Attends over a block, which is in a buffer."""
        form, walk, strip = self.form, self.walk, self.strip
        first, begin, end = valid_tiles(walk, item, block)
        strip_tiles = strip // form.tile
        strips = lax.div(begin, strip_tiles), pl.cdiv(end, strip_tiles)
        clear_outside(walk, slot, begin, end, *(s * strip_tiles for s in strips))
        pl.loop(*strips)(lambda s: self._lay_values(s, slot, begin, end))
        start = first * form.tile

        @pl.loop(0, self.tiles(item))
        def one_tile(u):
            q_first = item.begin + u * form.blocks.q_tokens
            q_last = jnp.minimum(q_first + form.blocks.q_tokens, item.end) - 1
            edge, whole, diagonal = stretches(form, strip, q_first - start, q_last - start)

            def attend(keys, masks, c):
                at = pl.multiple_of(c * keys, keys)
                self._attend_keys(u, slot, at, keys, masks, q_first - start - at)

            if form.sliding_window is not None:
                # No row is in a strip at its edge, unless it is as short as what rows and keys span.
                short = form.sliding_window < form.blocks.q_tokens + strip
                pl.loop(*edge)(functools.partial(attend, strip, Masks(short, True)))
            pl.loop(*whole)(functools.partial(attend, form.chunk, Masks(False, False)))
            pl.loop(*diagonal)(functools.partial(attend, strip, Masks(True, False)))

    def _lay_values(self, s: Any, slot: Any, begin: Any, end: Any) -> None:
        """Widens a strip's values and transposes them, and widens its keys where they need it."""
        form, kv, strip = self.form, self.walk.scratch.kv, self.strip
        tiles = pl.ds(s * (strip // form.tile), strip // form.tile)
        at = pl.ds(pl.multiple_of(s * strip, strip), strip)
        for h in range(form.kv_heads):
            k, v = (kv[slot, i, h, tiles].reshape(strip, form.head_dim) for i in (0, 1))
            d = form.head_dim
            self.state.values[h, pl.ds(d, _ONES), at] = jnp.ones((_ONES, strip), form.dtype)
            if form.scaled:
                v = v.astype(jnp.float32).T * self._strip_scales(slot, s, form.kv_heads + h)
                # The scale of a token not copied is whatever was there before.
                token = s * strip + lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where((token >= begin * form.tile) & (token < end * form.tile), v, 0.0)
                scales = jnp.broadcast_to(self._strip_scales(slot, s, h), (_SUBLANES, strip))
                k = k.astype(jnp.float32) * scales.T[:, :1]
                self.state.values[h, pl.ds(0, d), at] = v.astype(form.dtype)
            else:
                self.state.values[h, pl.ds(0, d), at] = v.astype(form.dtype).T
            if self.state.keys is not None:
                self.state.keys[h, at] = k.astype(form.dtype)

    def _strip_scales(self, slot: Any, s: Any, row: int) -> jax.Array:
        """float32 [1, strip]."""
        form, scales, strip = self.form, self.walk.scratch.scales, self.strip
        if strip >= form.page_size:
            pages = strip // form.page_size
            parts = [
                scales[slot, s * pages + p, pl.ds(row, 1), pl.ds(0, form.page_size)]
                for p in range(pages)
            ]
            return jnp.concatenate(parts, axis=1) if pages > 1 else parts[0]
        each = form.page_size // strip
        at = pl.ds(pl.multiple_of(lax.rem(s, each) * strip, strip), strip)
        return scales[slot, lax.div(s, each), pl.ds(row, 1), at]

    def _attend_keys(self, u, slot, at, keys, masks, ahead) -> None:
        """One query tile over `keys` keys of the block (static) from `at`, all heads; ahead: tokens from the
        first of these keys to the tile's first query."""
        kv_heads = self.form.kv_heads
        together = max(n for n in range(1, _TOGETHER + 1) if kv_heads % n == 0)

        @pl.loop(0, kv_heads // together)
        def some_heads(i):
            heads = [i * together + j for j in range(together)]
            self._attend_heads(u, slot, at, keys, masks, ahead, heads)

    def _attend_heads(self, u, slot, at, keys, masks, ahead, heads) -> None:
        """Some heads: the scores of one are made before the values of the one before are added."""
        # What is stored at 0 is loaded at indices that only the program knows. Else the compiler leaves
        # out the store and keeps all scores in registers, of which there are too few, from when they are
        # made, or from when they are loaded first, until they are needed last.
        zero = [self.state.zeros[i] for i in range(_ZEROS)]
        best: list[Any] = []
        for step in range(len(heads) + _AHEAD):
            if step < len(heads):
                best.append(self._score(u, slot, at, keys, masks, ahead, zero, heads[step], step))
            if step >= _AHEAD:
                i = step - _AHEAD
                self._add(u, at, keys, zero, heads[i], i, best[i])

    def _score(self, u, slot, at, keys, masks, ahead, zero, h, i: int) -> jax.Array:
        """Leaves the scores of a head, the i-th of those together, in their buffer; returns each row's best
        so far [1, rows]."""
        form, scratch, state = self.form, self.walk.scratch, self.state
        if state.keys is None:
            tiles = pl.ds(lax.div(at, form.tile), keys // form.tile)
            k = scratch.kv[slot, 0, h, tiles].reshape(keys, form.head_dim).astype(form.dtype)
        else:
            k = state.keys[h, pl.ds(at, keys)]
        products = dot(k, state.queries[u, h], 1, 1)
        buffer = state.scores[i % (_AHEAD + 1)]
        best = jnp.broadcast_to(state.best[u, h], (_SUBLANES, form.rows))
        # Masks are made for each head anew: one for all would take registers all the while.
        if any(masks):
            mine = state.zeros[_ZEROS + i]
            query = state.tokens[mine] + (ahead + mine)
        for begin in range(0, keys, _step(keys)):
            part = slice(begin, begin + _step(keys))
            scores = form.scores(products[part])
            if any(masks):
                key = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                scores = jnp.where(form.seen(query - begin, key, *masks), scores, MASKED)
            buffer[0, part] = scores
        for begin in range(0, keys, _step(keys)):
            scores = buffer[zero[0], begin : begin + _step(keys)]
            best = jnp.maximum(best, scores.reshape(-1, _SUBLANES, form.rows).max(axis=0))
        return best.max(axis=0, keepdims=True)

    def _add(self, u, at, keys, zero, h, i: int, best: jax.Array) -> None:
        """Adds the values of a head whose scores are in their buffer."""
        form, state = self.form, self.state
        scores, weights = (a[i % (_AHEAD + 1)] for a in (state.scores, state.weights))
        keep = jnp.exp2(state.best[u, h] - best)
        d = form.head_dim
        for begin in range(0, keys, _step(keys)):
            part = slice(begin, begin + _step(keys))
            weight = jnp.exp2(scores[zero[1], part] - best)
            weights[0, part] = weight.astype(form.dtype)
        state.best[u, h] = best
        values = state.values[h, :, pl.ds(at, keys)]
        added = dot(values, weights[zero[2], pl.ds(0, keys)], 1, 0)
        summed = d + _SUBLANES
        # A strip's sums are loaded when the head before has stored its own: not all of them at once.
        few, old = (_SUMMED, h + zero[3]) if keys == self.strip else (summed, h)
        for begin in range(0, summed, few):
            part = slice(begin, min(begin + few, summed))
            state.acc[u, h, part] = state.acc[u, old, part] * keep + added[part]

    def end(self, item: Item, rows_slot: Any) -> None:
        """Lays the item's results into the buffer of results."""
        form, out = self.form, self.walk.scratch.out
        tokens = form.blocks.q_tokens

        @pl.loop(0, self.tiles(item))
        def finish(u):
            @pl.loop(0, form.kv_heads)
            def head(h):
                total = self.state.acc[u, h, pl.ds(form.head_dim, 1)]
                result = self.state.acc[u, h, pl.ds(0, form.head_dim)]
                result = (result / jnp.where(total > 0, total, 1.0)).T
                result = result.reshape(tokens, form.groups, form.head_dim).astype(out.dtype)
                out[rows_slot, pl.ds(u * tokens, tokens), h] = result


def stretches(
    form: Form, strip: int, q_first: Any, q_last: Any
) -> tuple[tuple[Any, Any], tuple[Any, Any], tuple[Any, Any]]:
    """What queries of positions q_first .. q_last, from a block's first key on, see of it, as (begin, end):
    strips at the window's edge, then chunks that all of them see, then strips at the diagonal."""
    high, all_high = (jnp.clip(q + 1, 0, form.block) for q in (q_last, q_first))
    low = all_low = jnp.zeros_like(high)
    if form.sliding_window is not None:
        low, all_low = (
            jnp.clip(q - form.sliding_window + 1, 0, form.block) for q in (q_first, q_last)
        )
    low, high = lax.div(low, strip), pl.cdiv(high, strip)
    whole = pl.cdiv(all_low, form.chunk), lax.div(all_high, form.chunk)
    # Without a chunk, strips are the window's until all rows see the first key of one.
    several, edge = form.chunk // strip, jnp.minimum(pl.cdiv(all_low, strip), high)
    left, right = (jnp.where(whole[0] < whole[1], w * several, edge) for w in whole)
    return (low, left), whole, (right, high)


def _step(keys: int) -> int:
    """Keys whose scores are in registers together: few, so that none is spilled."""
    return min(keys, 2 * 16)
