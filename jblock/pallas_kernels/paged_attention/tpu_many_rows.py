"""Online softmax over a block of pages for many rows: scores are [keys, rows].

So the keys stream through the matrix unit past a tile of queries, a row's statistics take a lane each and
not a register of their own, and its largest score is found by comparing registers, without moving anything
across lanes. Values are transposed for that once a block, whatever number of query tiles it serves.

Long chunks of keys that all rows of a tile see need no mask; what is left at the diagonal and at a window's
edge goes in strips of 128 keys, masked. Scores and weights pass through vector memory on purpose, two
buffers of each: the products of one head then overlap with the exponentials of another, and no register is
spilled.

Weights are summed by the matrix unit, over rows of ones behind the values; behind a window, where few keys
beside the masked ones are left, from their buffer, which saves the sixteenth that the ones cost.
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
_AHEAD = 1  # heads whose scores are made while the values of one are added; of more, registers are spilled


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyState:
    """Of each query tile and kv head, then of the present head, then of the present block."""

    best: Any  # [1, rows]
    # [d + SUBLANES, rows]; behind d the sum of the weights in each row, or in parts (`_ones`)
    acc: Any
    scores: Any  # AHEAD + 1 of float32 [2, chunk, rows], of which the first half is used
    weights: Any  # as many of the products' dtype, likewise
    zeros: Any  # int32 [ZEROS + kv_heads] in SMEM, 0: see `ManyRows._attend_keys`
    tokens: Any  # int32 [1, 1, rows], each row's token of its tile
    queries: Any  # [q_tiles, kv_heads, rows, d], the item's without gaps
    keys: Any  # [kv_heads, block, d] widened; None: they need not be
    values: Any  # [kv_heads, d + ones, block], in the rows behind d ones


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
            zeros=pltpu.SMEM((_ZEROS + kv_heads,), jnp.int32),
            tokens=pltpu.VMEM((1, 1, form.rows), jnp.int32),
            queries=pltpu.VMEM((form.blocks.q_tiles, kv_heads, form.rows, d), form.dtype),
            keys=pltpu.VMEM((kv_heads, block, d), form.dtype) if form.scaled else None,
            values=pltpu.VMEM((kv_heads, d + _ones(form), block), form.dtype),
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
            low, high = jnp.int32(0), jnp.clip(q_last + 1 - start, 0, form.block)
            all_low, all_high = low, jnp.clip(q_first + 1 - start, 0, form.block)
            if form.sliding_window is not None:
                low = jnp.clip(q_first - form.sliding_window + 1 - start, 0, form.block)
                all_low = jnp.clip(q_last - form.sliding_window + 1 - start, 0, form.block)
            # Of strips: what some row sees, and in it the long chunks that all rows see.
            low, high = lax.div(low, strip), pl.cdiv(high, strip)
            whole = pl.cdiv(all_low, form.chunk), lax.div(all_high, form.chunk)
            several = form.chunk // strip
            some = whole[0] < whole[1]
            left = jnp.where(some, whole[0] * several, high)
            right = jnp.where(some, whole[1] * several, high)

            def attend(keys, masked, c):
                at = pl.multiple_of(c * keys, keys)
                self._attend_keys(u, slot, at, keys, masked, q_first, start)

            pl.loop(low, left)(functools.partial(attend, strip, True))
            pl.loop(*whole)(functools.partial(attend, form.chunk, False))
            pl.loop(right, high)(functools.partial(attend, strip, True))

    def _lay_values(self, s: Any, slot: Any, begin: Any, end: Any) -> None:
        """Widens a strip's values and transposes them, and widens its keys where they need it."""
        form, kv, strip = self.form, self.walk.scratch.kv, self.strip
        tiles = pl.ds(s * (strip // form.tile), strip // form.tile)
        at = pl.ds(pl.multiple_of(s * strip, strip), strip)
        for h in range(form.kv_heads):
            k, v = (kv[slot, i, h, tiles].reshape(strip, form.head_dim) for i in (0, 1))
            d, ones = form.head_dim, _ones(form)
            if ones:
                self.state.values[h, pl.ds(d, ones), at] = jnp.ones((ones, strip), form.dtype)
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

    def _attend_keys(self, u, slot, at, keys, masked, q_first, start) -> None:
        """One query tile over `keys` keys of the block (static) from `at`, all heads: the scores of a
        head are made before the values of the one before are added."""
        ahead = q_first - start - at if masked else None
        # What is stored at 0 is loaded at indices that only the program knows. Else the compiler leaves
        # out the store and keeps all scores in registers, of which there are too few, from when they are
        # made, or from when they are loaded first, until they are needed last.
        zero = [self.state.zeros[i] for i in range(_ZEROS)]
        best: list[Any] = []
        for step in range(self.form.kv_heads + _AHEAD):
            if step < self.form.kv_heads:
                best.append(self._score(u, slot, at, keys, ahead, zero, step))
            if step >= _AHEAD:
                self._add(u, at, keys, masked, zero, step - _AHEAD, best[step - _AHEAD])

    def _score(self, u, slot, at, keys, ahead, zero, h: int) -> jax.Array:
        """Leaves a head's scores in their buffer; returns each row's best so far [1, rows]. ahead: tokens
        from the first of these keys to the tile's first query, if they are to be masked, else None."""
        form, scratch, state = self.form, self.walk.scratch, self.state
        if state.keys is None:
            tiles = pl.ds(lax.div(at, form.tile), keys // form.tile)
            k = scratch.kv[slot, 0, h, tiles].reshape(keys, form.head_dim).astype(form.dtype)
        else:
            k = state.keys[h, pl.ds(at, keys)]
        products = dot(k, state.queries[u, h], 1, 1)
        buffer = state.scores[h % (_AHEAD + 1)]
        best = jnp.broadcast_to(state.best[u, h], (_SUBLANES, form.rows))
        # Masks are made for each head anew: one for all would take registers all the while.
        if ahead is not None:
            mine = state.zeros[_ZEROS + h]
            query = state.tokens[mine] + (ahead + mine)
        for begin in range(0, keys, _step(keys)):
            part = slice(begin, begin + _step(keys))
            scores = form.scores(products[part])
            if ahead is not None:
                key = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                scores = jnp.where(form.seen(query - begin, key), scores, MASKED)
            buffer[0, part] = scores
        for begin in range(0, keys, _step(keys)):
            scores = buffer[zero[0], begin : begin + _step(keys)]
            best = jnp.maximum(best, scores.reshape(-1, _SUBLANES, form.rows).max(axis=0))
        return best.max(axis=0, keepdims=True)

    def _add(self, u, at, keys, masked, zero, h: int, best: jax.Array) -> None:
        """Adds the values of a head whose scores are in their buffer."""
        form, state = self.form, self.state
        scores, weights = (a[h % (_AHEAD + 1)] for a in (state.scores, state.weights))
        keep = jnp.exp2(state.best[u, h] - best)
        d = form.head_dim
        for begin in range(0, keys, _step(keys)):
            part = slice(begin, begin + _step(keys))
            weight = jnp.exp2(scores[zero[1], part] - best)
            weights[0, part] = weight.astype(form.dtype)
        state.best[u, h] = best
        values = state.values[h, :, pl.ds(at, keys)]
        added = dot(values, weights[zero[2], pl.ds(0, keys)], 1, 0)
        summed = d + _SUBLANES if _ones(form) else d
        # A strip's sums are loaded when the head before has stored its own: not all of them at once.
        few, old = (_SUMMED, h + zero[3]) if masked else (summed, h)
        for begin in range(0, summed, few):
            part = slice(begin, min(begin + few, summed))
            state.acc[u, h, part] = state.acc[u, old, part] * keep + added[part]
        if not _ones(form):
            # From vector memory: the compiler adds late, and would keep all weights in registers until then.
            total = jnp.zeros((_SUBLANES, form.rows), jnp.float32)
            for begin in range(0, keys, _step(keys)):
                weight = weights[zero[2], begin : begin + _step(keys)].astype(jnp.float32)
                total += weight.reshape(-1, _SUBLANES, form.rows).sum(axis=0)
            sums = pl.ds(d, _SUBLANES)
            state.acc[u, h, sums] = state.acc[u, old, sums] * keep + total

    def end(self, item: Item, rows_slot: Any) -> None:
        """Lays the item's results into the buffer of results."""
        form, out = self.form, self.walk.scratch.out
        tokens = form.blocks.q_tokens

        @pl.loop(0, self.tiles(item))
        def finish(u):
            @pl.loop(0, form.kv_heads)
            def head(h):
                # One of the rows that hold it all, or all that hold a part.
                sums = 1 if _ones(form) else _SUBLANES
                total = self.state.acc[u, h, pl.ds(form.head_dim, sums)]
                total = total.sum(axis=0, keepdims=True)
                result = self.state.acc[u, h, pl.ds(0, form.head_dim)]
                result = (result / jnp.where(total > 0, total, 1.0)).T
                result = result.reshape(tokens, form.groups, form.head_dim).astype(out.dtype)
                out[rows_slot, pl.ds(u * tokens, tokens), h] = result


def _ones(form: Form) -> int:
    """Rows of ones behind the values."""
    return _ONES if form.sliding_window is None else 0


def _step(keys: int) -> int:
    """Keys whose scores are in registers together: few, so that none is spilled."""
    return min(keys, 2 * 16)
