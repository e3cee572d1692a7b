"""The Hopper kernel of ragged paged attention: what one CUDA block does (Mosaic GPU).

A block has one or two compute warpgroups, each with 64 rows of queries (tokens x heads of one KV head),
and one that moves memory (gpu_fetch.py). The softmax is online (FlashAttention, arXiv 2205.14135; the
ping-pong of two warpgroups: FlashAttention-3, arXiv 2407.08608). New keys and values are read from the call's
own arrays, never through the pages, so no block depends on what another one writes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention import gpu_fetch, gpu_walk
from jblock.pallas_kernels.paged_attention.gpu_plan import ROWS, Plan

_MASKED = -1e30
_LOG2E = math.log2(math.e)


def body(plan: Plan, refs: Any, s: Any) -> None:
    """One block: the tile `tile` of KV head `head`, its part `split` of the keys.

    Args:
      plan: what is static.
      refs: q [T, heads, d]; k_new, v_new [R, kv_heads, d] and starts [S], the new rows as they are attended
        to (gpu_walk.new_rows); k_rows, v_rows [T, kv_heads, d], as they go into the pages; tiles
        (gpu_walk.tile_table); page_table [S, max_pages]; k_pages, v_pages [pages, kv_heads, page_size, d];
        out [splits, T, heads, d]; with several splits lse [splits, tiles, kv_heads, 64], base 2; with 8-bit
        pages also k_scales, v_scales [pages, kv_heads, page_size].
      s: what `gpu_plan.scratch` lists.
    """
    tile, head, split = (lax.axis_index(a) for a in ("tile", "head", "split"))
    seq, row, count, cached, first = (refs.tiles[tile, i] for i in range(5))
    walk = gpu_walk.walk(count, cached, first, block_kv=plan.block_kv, window=plan.sliding_window)
    begin, end = gpu_walk.split_range(walk.num_steps, split, plan.splits)
    steps = end - begin
    wg = lax.axis_index("wg")

    @pl.when((wg < plan.compute_warpgroups) & (count > 0))
    def _compute() -> None:
        if plan.registers:
            plgpu.set_max_registers(plan.registers[0], action="increase")
        _attend(plan, refs, s, walk, begin, steps, row, count, tile, head, split, wg)

    @pl.when((wg == plan.compute_warpgroups) & (count > 0))
    def _move() -> None:
        if plan.registers:
            plgpu.set_max_registers(plan.registers[1], action="decrease")
        tile_of = gpu_fetch.Tile(walk, begin, steps, seq, refs.starts[seq], head)
        gpu_fetch.fetch(plan, refs, s, tile_of)

        @pl.when(split == 0)
        def _write() -> None:
            gpu_fetch.write_new_rows(plan, refs, s, walk.first_query, seq, row, count, head)


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
        acc *= lax.broadcast_in_dim(keep, acc.shape, [0])
        if pair:
            rendezvous()

        plgpu.barrier_wait(s.v_full.at[slot])
        acc = hopper.add_product(acc, weights, s.v_ring.at[slot])
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
            hopper.accumulator((ROWS, d), 0.0),
            hopper.per_row(ROWS, _MASKED),
            hopper.per_row(ROWS, 0.0),
        ),
    )
    if pair:
        pl.when(wg == 0)(rendezvous)

    total = jnp.where(total > 0, total, 1.0)
    stage = s.q_rows if plan.splits == 1 else s.out_rows
    acc /= lax.broadcast_in_dim(total, acc.shape, [0])
    stage[wg] = acc.astype(plan.out_dtype)
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
