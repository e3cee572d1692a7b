"""The Hopper kernel of ragged paged attention: what one CUDA block does (Mosaic GPU).

A block has one or two compute warpgroups, each with 64 rows of queries (tokens x heads of one KV head),
and one that moves memory. Keys and values arrive by TMA through a ring of shared memory buffers; the
softmax is online (FlashAttention, arXiv 2205.14135; the ping-pong of two warpgroups: FlashAttention-3,
arXiv 2407.08608). New keys and values are read from the call's own arrays, never through the pages, so no
block depends on what another one writes: the memory warpgroup stores the tile's new rows into the pages
meanwhile, to slots that no block reads as cached.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention import gpu_walk

ROWS = 64
"""Rows of a wgmma accumulator: what one compute warpgroup serves."""

_MASKED = -1e30
_LOG2E = math.log2(math.e)
_WRITE_ROWS = 16
_EDGE_ROWS = 16  # of a page that is seen in part


def token_rows(groups: int, head_dim: int) -> int:
    """See Plan.token_rows."""
    unit = 64 // math.gcd(head_dim, 64)
    return -(-groups // unit) * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static of one kernel.

    Attributes:
      groups: query heads of a KV head.
      head_dim: width of a head, a multiple of 16.
      page_size: tokens of a page.
      max_q_len: bound on the new tokens of a sequence.
      kv_dtype: dtype of the pages.
      compute_warpgroups: 1 or 2; a tile has that many times 64 // groups tokens.
      block_kv: keys of a step, a multiple of 64 that divides page_size or is a multiple of it.
      stages: buffers of the ring.
      splits: parts that the keys of a tile are divided into.
      sliding_window: as in `api.paged_attention`.
      softcap: likewise.
      scale: likewise.
    """

    groups: int
    head_dim: int
    page_size: int
    max_q_len: int
    kv_dtype: Any
    compute_warpgroups: int
    block_kv: int
    stages: int
    splits: int
    sliding_window: int | None
    softcap: float | None
    scale: float

    @property
    def token_rows(self) -> int:
        """Rows of a tile that a token takes: its heads, and idle ones where TMA's alignment of 128 bytes
        asks for them."""
        return token_rows(self.groups, self.head_dim)

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens that one compute warpgroup has room for."""
        return ROWS // self.token_rows

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile has room for."""
        return self.compute_warpgroups * self.warpgroup_tokens

    @property
    def piece(self) -> int:
        """Keys that one copy brings of a cached block: a page, or the part of one that is the block."""
        return min(self.page_size, self.block_kv)

    @property
    def pieces(self) -> int:
        """Pieces of a cached block."""
        return self.block_kv // self.piece

    @property
    def edge(self) -> int:
        """Keys of one copy where a piece is seen in part: at the window's edge and the end of the cache."""
        return min(self.piece, _EDGE_ROWS)

    @property
    def arrivals(self) -> int:
        """Arrivals that make a block full: one for each copy there may be."""
        return self.block_kv // self.edge

    @property
    def new_piece(self) -> int:
        """Keys that the one copy of a new block brings: for decoding the eight rows of a swizzle."""
        return min(self.block_kv, -(-self.max_q_len // 8) * 8)

    @property
    def write_rows(self) -> int:
        """New rows staged at a time on their way into the pages."""
        unit = token_rows(1, self.head_dim)
        return min(_WRITE_ROWS, -(-self.max_q_len // unit) * unit)

    @property
    def out_dtype(self) -> Any:
        """Parts of a softmax are combined in float32."""
        return jnp.float32 if self.splits > 1 else jnp.bfloat16


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a block, by the names `body` takes."""
    wgs, d, bf16 = plan.compute_warpgroups, plan.head_dim, jnp.bfloat16
    ring = (plan.stages, plan.block_kv, d)
    queries = min(plan.warpgroup_tokens, plan.max_q_len)
    out = {
        "q_rows": plgpu.SMEM((wgs, ROWS, d), bf16),
        "q_tile": hopper.swizzled((wgs, ROWS, d), bf16),
        "k_ring": hopper.swizzled(ring, bf16),
        "v_ring": hopper.swizzled(ring, bf16),
        "k_write": plgpu.SMEM((plan.write_rows, d), bf16),
        "v_write": plgpu.SMEM((plan.write_rows, d), bf16),
        "q_ready": plgpu.Barrier(num_arrivals=queries, num_barriers=wgs),
        "k_full": plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=plan.stages),
        # The last one is for values that have to be cleared before anybody sees them.
        "v_full": plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=plan.stages + 1),
        "k_free": plgpu.Barrier(num_arrivals=wgs, num_barriers=plan.stages),
        "v_free": plgpu.Barrier(num_arrivals=wgs, num_barriers=plan.stages),
        "turn": plgpu.Barrier(num_arrivals=wgs),
        "write_ready": plgpu.Barrier(num_arrivals=2),
    }
    if plan.splits > 1:
        out["out_rows"] = plgpu.SMEM((wgs, ROWS, d), jnp.float32)
        out["lse_rows"] = plgpu.SMEM((ROWS,), jnp.float32)
    return out


def body(plan: Plan, refs: Any, s: Any) -> None:
    """One block: the tile `tile` of KV head `head`, its part `split` of the keys.

    Args:
      plan: what is static.
      refs: q [T, heads, d]; k_new, v_new [T, kv_heads, d]; tiles (gpu_walk.tile_table); page_table [S,
        max_pages]; k_pages, v_pages [pages, kv_heads, page_size, d]; out [splits, T, heads, d]; with
        several splits lse [splits, tiles, kv_heads, 64], base 2.
      s: what `scratch` lists.
    """
    tile, head, split = (lax.axis_index(a) for a in ("tile", "head", "split"))
    seq, row, count, cached, first = (refs.tiles[tile, i] for i in range(5))
    walk = gpu_walk.walk(count, cached, first, block_kv=plan.block_kv, window=plan.sliding_window)
    begin, end = gpu_walk.split_range(walk.num_steps, split, plan.splits)
    steps = end - begin
    wg = lax.axis_index("wg")

    @pl.when((wg < plan.compute_warpgroups) & (count > 0))
    def _compute() -> None:
        if plan.compute_warpgroups > 1:
            plgpu.set_max_registers(224, action="increase")
        _attend(plan, refs, s, walk, begin, steps, row, count, tile, head, split, wg)

    @pl.when((wg == plan.compute_warpgroups) & (count > 0))
    def _move() -> None:
        if plan.compute_warpgroups > 1:
            plgpu.set_max_registers(64, action="decrease")
        _fetch(plan, refs, s, walk, begin, steps, seq, row - first, head)

        @pl.when(split == 0)
        def _write() -> None:
            _write_new_rows(plan, refs, s, walk.first_query, seq, row, count, head)


def _fetch(
    plan: Plan,
    refs: Any,
    s: Any,
    walk: Any,
    begin: Any,
    steps: Any,
    seq: Any,
    seq_row: Any,
    head: Any,
) -> None:
    """Brings the keys and values of the tile's steps, as the ring has room."""
    last_page = refs.page_table.shape[1] - 1

    def pages(step: Any) -> tuple[Any, ...]:
        at = gpu_walk.block_at(walk, step, block_kv=plan.block_kv).position
        logical = (lax.div(at + i * plan.piece, plan.page_size) for i in range(plan.pieces))
        return tuple(refs.page_table[seq, jnp.minimum(i, last_page)] for i in logical)

    def fetch(
        source: Any, new: Any, ring: Any, ready: Any, block: Any, ids: Any, slot: Any
    ) -> None:
        @pl.when(block.is_new == 1)
        def _from_new() -> None:
            rows = pl.ds(seq_row + block.position - walk.cached, plan.new_piece)
            plgpu.copy_gmem_to_smem(
                new.at[rows, head], ring.at[slot, pl.ds(0, plan.new_piece)], ready
            )
            for _ in range(plan.arrivals - 1):
                plgpu.barrier_arrive(ready)

        @pl.when(block.is_new == 0)
        def _from_pages() -> None:
            inside = lax.rem(block.position, plan.page_size) if plan.pieces == 1 else 0
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

    def clear_unseen(block: Any, slot: Any) -> None:
        # Beside the values that are seen lie other sequences' rows, or whatever was in shared memory: it
        # may be NaN, and 0 x NaN is NaN.
        raw = s.v_full.at[plan.stages]
        plgpu.barrier_wait(raw)
        width = hopper.swizzle_columns(plan.head_dim, jnp.bfloat16)
        for top in range(0, plan.block_kv, ROWS):
            key = hopper.iota((ROWS, width), 0) + top
            seen = (key >= block.head) & (key < block.tail)
            for left in range(0, plan.head_dim, width):
                part = s.v_ring.at[slot, top : top + ROWS, left : left + width]
                part[...] = jnp.where(seen, hopper.load(part), jnp.bfloat16(0))
        plgpu.commit_smem()
        for _ in range(plan.arrivals):
            plgpu.barrier_arrive(s.v_full.at[slot])

    def step(i: Any, ids: tuple[Any, ...]) -> tuple[Any, ...]:
        # The next step's page ids are on their way while this step waits for room.
        next_ids = pages(begin + i + 1)
        block = gpu_walk.block_at(walk, begin + i, block_kv=plan.block_kv)
        slot = lax.rem(i, plan.stages)
        pl.when(i >= plan.stages)(lambda: plgpu.barrier_wait(s.k_free.at[slot]))
        fetch(refs.k_pages, refs.k_new, s.k_ring, s.k_full.at[slot], block, ids, slot)
        pl.when(i >= plan.stages)(lambda: plgpu.barrier_wait(s.v_free.at[slot]))
        partly = (block.head > 0) | (block.tail < plan.block_kv)
        ready = s.v_full.at[jnp.where(partly, plan.stages, slot)]
        fetch(refs.v_pages, refs.v_new, s.v_ring, ready, block, ids, slot)
        pl.when(partly)(lambda: clear_unseen(block, slot))
        return next_ids

    lax.fori_loop(0, steps, step, pages(begin))

    @pl.loop(jnp.maximum(steps - plan.stages, 0), steps)
    def _drain(i: Any) -> None:
        plgpu.barrier_wait(s.k_free.at[lax.rem(i, plan.stages)])
        plgpu.barrier_wait(s.v_free.at[lax.rem(i, plan.stages)])


def _write_new_rows(
    plan: Plan, refs: Any, s: Any, position: Any, seq: Any, row: Any, count: Any, head: Any
) -> None:
    """Stores the tile's new keys and values into their pages."""

    @pl.loop(0, gpu_walk.cdiv(count, plan.write_rows))
    def _chunk(i: Any) -> None:
        done = i * plan.write_rows
        for new, stage in ((refs.k_new, s.k_write), (refs.v_new, s.v_write)):
            plgpu.copy_gmem_to_smem(
                new.at[pl.ds(row + done, plan.write_rows), head], stage, s.write_ready
            )
        plgpu.barrier_wait(s.write_ready)

        @pl.loop(0, jnp.minimum(count - done, plan.write_rows))
        def _row(j: Any) -> None:
            at = position + done + j
            page = refs.page_table[seq, lax.div(at, plan.page_size)]
            slot = lax.rem(at, plan.page_size)
            for stage, pages in ((s.k_write, refs.k_pages), (s.v_write, refs.v_pages)):
                plgpu.copy_smem_to_gmem(stage.at[pl.ds(j, 1)], pages.at[page, head, pl.ds(slot, 1)])

        plgpu.wait_smem_to_gmem(0)


def _attend(
    plan: Plan,
    refs: Any,
    s: Any,
    walk: Any,
    begin: Any,
    steps: Any,
    row: Any,
    count: Any,
    tile: Any,
    head: Any,
    split: Any,
    wg: Any,
) -> None:
    """One compute warpgroup: its rows' softmax over the steps, and their output."""
    groups, token_rows = plan.groups, plan.token_rows
    block_kv, d = plan.block_kv, plan.head_dim
    # A product and the sum it is added to both lie in registers: too many for 256 columns at once.
    columns = [(left, min(left + 128, d)) for left in range(0, d, 128)]
    pair = plan.compute_warpgroups == 2
    before = wg * plan.warpgroup_tokens
    tokens = gpu_walk.clip(count - before, 0, plan.warpgroup_tokens)

    def rows_of(ref: Any, i: Any) -> Any:
        return ref.at[wg, pl.ds(i * token_rows, groups)]

    @pl.loop(0, min(plan.warpgroup_tokens, plan.max_q_len))
    def _queries(i: Any) -> None:
        @pl.when(i < tokens)
        def _copy() -> None:
            plgpu.copy_gmem_to_smem(
                refs.q.at[row + before + i, pl.ds(head * groups, token_rows)],
                s.q_rows.at[wg, pl.ds(i * token_rows, token_rows)],
                s.q_ready.at[wg],
            )

        pl.when(i >= tokens)(lambda: plgpu.barrier_arrive(s.q_ready.at[wg]))

    plgpu.barrier_wait(s.q_ready.at[wg])
    s.q_tile[wg] = hopper.load(s.q_rows.at[wg])
    plgpu.commit_smem()

    def rendezvous() -> None:
        plgpu.barrier_arrive(s.turn)
        plgpu.barrier_wait(s.turn)

    def mask(scores: jax.Array, block: Any) -> jax.Array:
        column = hopper.iota((ROWS, block_kv), 1)
        # Row r is token r // token_rows: `token >= x` is `r >= x * token_rows`, without a division.
        r = hopper.iota((ROWS, block_kv), 0)
        ahead = block.position - walk.first_query - before
        visible = (r >= (column + ahead) * token_rows) & (column < block.tail)
        if plan.sliding_window is not None:
            visible &= r < (column + (ahead + plan.sliding_window)) * token_rows
        return jnp.where(visible, scores, _MASKED)

    def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        acc, best, total = carry
        slot = lax.rem(i, plan.stages)
        block = gpu_walk.block_at(walk, begin + i, block_kv=block_kv)

        plgpu.barrier_wait(s.k_full.at[slot])
        scores = hopper.matmul(
            s.q_tile.at[wg], s.k_ring.at[slot], transpose_b=True, then=rendezvous if pair else None
        )
        plgpu.barrier_arrive(s.k_free.at[slot])

        if plan.softcap is None:
            scores *= plan.scale * _LOG2E
        else:
            # tanh(x) = 1 - 2 / (1 + e^2x): the hardware's own tanh is good to 11 bits only.
            e = jnp.exp2(scores * (2 * _LOG2E * plan.scale / plan.softcap))
            scores = (plan.softcap * _LOG2E) * (1.0 - 2.0 / (1.0 + e))
        scores = lax.cond(
            gpu_walk.needs_mask(walk, block, block_kv=block_kv, window=plan.sliding_window),
            lambda x: mask(x, block),
            lambda x: x,
            scores,
        )
        new_best = jnp.maximum(best, scores.max(axis=1))
        keep = jnp.exp2(best - new_best)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_best, scores.shape, [0]))
        total = total * keep + weights.sum(axis=1)
        weights = weights.astype(jnp.bfloat16)
        if pair:
            rendezvous()

        plgpu.barrier_wait(s.v_full.at[slot])
        acc = tuple(
            part * lax.broadcast_in_dim(keep, part.shape, [0])
            + hopper.matmul(weights, s.v_ring.at[slot, :, left:right])
            for part, (left, right) in zip(acc, columns, strict=True)
        )
        plgpu.barrier_arrive(s.v_free.at[slot])
        return acc, new_best, total

    if pair:
        # One warpgroup's softmax runs beside the other's matmuls: they go half a step apart.
        pl.when(wg == 1)(rendezvous)
    acc, best, total = lax.fori_loop(
        0,
        steps,
        step,
        (
            tuple(hopper.accumulator((ROWS, right - left), 0.0) for left, right in columns),
            hopper.per_row(ROWS, _MASKED),
            hopper.per_row(ROWS, 0.0),
        ),
    )
    if pair:
        pl.when(wg == 0)(rendezvous)

    total = jnp.where(total > 0, total, 1.0)
    stage = s.q_rows if plan.splits == 1 else s.out_rows
    for part, (left, right) in zip(acc, columns, strict=True):
        part /= lax.broadcast_in_dim(total, part.shape, [0])
        stage[wg, :, left:right] = part.astype(plan.out_dtype)
    if plan.splits > 1:
        s.lse_rows[...] = best + jnp.log(total) * _LOG2E
    plgpu.commit_smem()

    @pl.loop(0, tokens)
    def _store(i: Any) -> None:
        plgpu.copy_smem_to_gmem(
            rows_of(stage, i),
            refs.out.at[split, row + before + i, pl.ds(head * groups, groups)],
        )

    if plan.splits > 1:
        plgpu.copy_smem_to_gmem(s.lse_rows, refs.lse.at[split, tile, head])
    plgpu.wait_smem_to_gmem(0)
