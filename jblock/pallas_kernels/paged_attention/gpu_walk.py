"""Which rows a CUDA block of the Hopper kernel serves and which keys it visits, as plain integer functions.

A block serves a *tile*: a run of one sequence's new tokens, for the query heads of one KV head. It
visits keys in *steps* of `block_kv` positions: first those cached before this call, through the page
table, then the new ones, straight from the arrays that hold them. Tiles that see the same keys from
different splits (flash-decoding) divide the steps between them.

Everything here works on Python ints, numpy arrays and traced values alike, so that the kernel and its
tests share it. All numbers are non-negative unless said.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.paged_attention.ragged import Ragged

Int = Any
"""A Python int or an int32 scalar or array."""

TILE_FIELDS = ("seq", "row", "count", "cached", "first")


def _div(a: Int, b: int) -> Int:
    # Truncating division is one shift for powers of two; `//` on traced values adds a sign fix-up.
    return a // b if isinstance(a, int) else jax.lax.div(a, jnp.full_like(a, b))


def cdiv(a: Int, b: int) -> Int:
    """a / b rounded up."""
    return _div(a + (b - 1), b)


def _max(a: Int, b: Int) -> Int:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _min(a: Int, b: Int) -> Int:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def clip(a: Int, low: Int, high: Int) -> Int:
    """a, raised to low, then lowered to high."""
    return _min(_max(a, low), high)


def num_tiles(rows: int, num_seqs: int, max_q_len: int, tile_tokens: int) -> int:
    """Tiles that always suffice: every sequence may end in a part of one."""
    return min(num_seqs * cdiv(max_q_len, tile_tokens), num_seqs + rows // tile_tokens)


def tile_table(ragged: Ragged, rows: int, tile_tokens: int) -> jax.Array:
    """The tiles of a batch.

    Args:
      ragged: the batch.
      rows: T.
      tile_tokens: new tokens a tile may hold.

    Returns:
      int32 [num_tiles, 5] of TILE_FIELDS: the sequence, the flat row of the tile's first token, its
      tokens (0: an unused tile), the tokens cached before this call, and the index of the tile's first
      token among the sequence's new ones. Where sequences may have several tiles, those that see most keys
      come first.
    """
    total = num_tiles(rows, ragged.num_seqs, ragged.max_q_len, tile_tokens)
    if ragged.max_q_len <= tile_tokens:
        seq = jnp.arange(ragged.num_seqs, dtype=jnp.int32)
        first = jnp.zeros_like(seq)
    else:
        # Tile t is the (t - before)-th of the first sequence whose tiles, with those before, pass t.
        ends = jnp.cumsum(cdiv(ragged.q_lens, tile_tokens), dtype=jnp.int32)
        tile = jnp.arange(total, dtype=jnp.int32)
        seq = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[seq]
        first = (tile - before) * tile_tokens
        used = seq < ragged.num_seqs
        seq = jnp.where(used, seq, 0)
        first = jnp.where(used, first, ragged.q_lens[0])
    q_len = ragged.q_lens[seq]
    count = jnp.clip(q_len - first, 0, tile_tokens)
    cached = ragged.kv_lens[seq] - q_len
    table = jnp.stack([seq, ragged.row_starts[seq] + first, count, cached, first], axis=1)
    return table if ragged.max_q_len <= tile_tokens else _longest_first(table)


def _longest_first(table: jax.Array) -> jax.Array:
    """Tiles ordered by the keys they see: the chip starts them in order, and a long one that starts last
    would run alone."""
    keys = jnp.where(table[:, 2] > 0, table[:, 2:].sum(axis=1), 0)
    index = jnp.arange(keys.size, dtype=jnp.int32)
    earlier = (keys > keys[:, None]) | ((keys == keys[:, None]) & (index < index[:, None]))
    place = earlier.sum(axis=1, dtype=jnp.int32)
    return jnp.zeros_like(table).at[place].set(table, unique_indices=True)


def new_rows(ragged: Ragged, rows: int) -> tuple[jax.Array, jax.Array | None]:
    """How new keys and values have to lie for TMA, which brings them in tiles of 8 rows: a sequence's begin
    at a multiple of 8, unless they all lie in one tile (`hopper.whole_tiles`).

    Args:
      ragged: the batch.
      rows: T.

    Returns:
      int32 [S], where each sequence's first one is, and int32 [R], which of the T rows to put at each of R
      places; None: they can stay where they are.
    """
    bound = ragged.max_q_len
    in_tiles = ragged.is_grid and (bound % 8 == 0 or 8 % bound == 0)
    if bound == 1 or rows <= 8 or in_tiles:
        return ragged.row_starts, None
    sizes = cdiv(ragged.q_lens, 8) * 8
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts, seqs = ends - sizes, ragged.num_seqs
    place = jnp.arange(min(seqs * cdiv(bound, 8), (rows + 7 * seqs) // 8) * 8, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, place, side="right", method="compare_all").astype(jnp.int32)
    seq = jnp.minimum(seq, seqs - 1)
    return starts, jnp.clip((ragged.row_starts - starts)[seq] + place, 0, rows - 1)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The steps of one tile.

    Attributes:
      first_query: position of the tile's first token.
      last_query: position of its last token.
      lowest: the lowest position that any of its tokens sees.
      cached: tokens cached before this call; positions from here on are new.
      cached_block: the first cached block visited, in units of block_kv positions.
      num_cached: cached blocks visited.
      new_block: the first block of new tokens visited.
      num_steps: blocks visited in all.
    """

    first_query: Int
    last_query: Int
    lowest: Int
    cached: Int
    cached_block: Int
    num_cached: Int
    new_block: Int
    num_steps: Int


def walk(count: Int, cached: Int, first: Int, *, block_kv: int, window: int | None) -> Walk:
    """The steps of the tile of `count` tokens from the `first`-th new one on; none if count is 0."""
    first_query = cached + first
    last_query = first_query + count - 1
    lowest = first_query * 0 if window is None else _max(first_query - (window - 1), 0)
    cached_block = _div(_min(lowest, cached), block_kv)
    num_cached = _max(cdiv(cached, block_kv) - cached_block, 0)
    # A window that begins at or past the end of the cache leaves no cached block to visit.
    num_cached = num_cached * _min(_max(cached - lowest, 0), 1)
    new_block = _div(_max(lowest - cached, 0), block_kv)
    num_new = cdiv(first + count, block_kv) - new_block
    num_steps = (num_cached + num_new) * _min(count, 1)
    return Walk(
        first_query, last_query, lowest, cached, cached_block, num_cached, new_block, num_steps
    )


def split_range(num_steps: Int, split: Int, splits: int) -> tuple[Int, Int]:
    """The steps [begin, end) of one split; later splits may have none."""
    share = cdiv(num_steps, splits)
    begin = _min(split * share, num_steps)
    return begin, _min(begin + share, num_steps)


@dataclasses.dataclass(frozen=True)
class Block:
    """One step's keys.

    Attributes:
      is_new: whether they come from this call's arrays (else from pages); int 0 or 1.
      position: position of the block's first key.
      head: first key of the block that some query sees.
      tail: keys from here on are not visible to any query, or not the sequence's.
    """

    is_new: Int
    position: Int
    head: Int
    tail: Int


def block_at(w: Walk, step: Int, *, block_kv: int) -> Block:
    """The keys of step `step` of a walk (0 <= step < num_steps)."""
    is_new = _min(_max(step - w.num_cached + 1, 0), 1)
    cached_position = (w.cached_block + step) * block_kv
    new_position = w.cached + (w.new_block + step - w.num_cached) * block_kv
    position = is_new * new_position + (1 - is_new) * cached_position
    end = is_new * (w.last_query + 1) + (1 - is_new) * w.cached
    return Block(
        is_new,
        position,
        clip(w.lowest - position, 0, block_kv),
        clip(end - position, 0, block_kv),
    )


def segments(
    w: Walk, begin: Int, end: Int, *, block_kv: int, window: int | None
) -> list[tuple[Int, Int, Int]]:
    """The steps [begin, end) of a walk as runs that follow each other: (first, masked, last) says that steps
    [first, masked) need no mask (`needs_mask`), and steps [masked, last) may.

    A window hides keys of the first cached blocks from some queries; the last cached block may be seen in
    part; and new blocks are seen by all of a tile's queries up to the one that the first query stands in.
    """
    cached = w.num_cached
    in_part = _min(w.cached - _div(w.cached, block_kv) * block_kv, 1)  # 1: not in whole blocks
    seen_by_all = _div(_max(w.first_query - w.cached + 1, 0), block_kv) - w.new_block
    seen_by_all = cached + clip(seen_by_all, 0, w.num_steps - cached)
    if window is None:
        runs = [(0, _max(cached - in_part, 0), cached), (cached, seen_by_all, w.num_steps)]
    else:
        # Blocks that begin at or before this position are not seen whole by the last query.
        edge = w.last_query - window
        old = clip(_div(_max(edge - w.cached_block * block_kv + block_kv, 0), block_kv), 0, cached)
        new = _div(_max(edge - w.cached + block_kv, 0), block_kv) - w.new_block
        new = cached + clip(new, 0, w.num_steps - cached)
        runs = [
            (0, 0, old),
            (old, _max(old, cached - in_part), new),
            (new, _max(new, seen_by_all), w.num_steps),
        ]
    return [tuple(clip(bound, begin, end) for bound in run) for run in runs]  # type: ignore[misc]


def needs_mask(w: Walk, block: Block, *, block_kv: int, window: int | None) -> Any:
    """Whether some query of the tile must not see some key of the block."""
    masked = (block.position + block_kv - 1 > w.first_query) | (block.tail < block_kv)
    if window is not None:
        masked |= block.position <= w.last_query - window
    return masked


def piece_is_read(block: Block, offset: int, size: int) -> Any:
    """Whether the keys [offset, offset + size) of a cached block, a page or part of one, are read."""
    return (offset < block.tail) & (offset + size > block.head)
