"""The Hopper kernel of ragged paged attention: what one CUDA block does (Mosaic GPU).

A block has one or two compute warpgroups, each with 64 rows of queries (tokens x heads of one KV head),
and one that moves memory (gpu_fetch.py). The softmax is online (FlashAttention, arXiv 2205.14135; the
ping-pong of two warpgroups: FlashAttention-3, arXiv 2407.08608). New keys and values are read from the call's
own arrays, never through the pages, so no block depends on what another one writes.
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
from jblock.pallas_kernels.paged_attention import gpu_fetch, gpu_walk
from jblock.pallas_kernels.paged_attention.gpu_plan import ROWS, Plan
from jblock.pallas_kernels.paged_attention.gpu_refs import Arrays, Ref, Scratch

Int = Any
"""A traced int32 scalar, or a Python int."""
_MASKED = -1e30
_LOG2E = math.log2(math.e)


def body(plan: Plan, a: Arrays, s: Scratch) -> None:
    """One block: the tile `tile` of KV head `head`, its part `split` of the keys.

    Args:
      plan: what is static.
      a: arrays of the call.
      s: shared memory and barriers.
    """
    tile, head, split = (lax.axis_index(axis) for axis in ("tile", "head", "split"))
    seq, row, count, cached, first = (a.tiles[tile, i] for i in range(5))
    walk = gpu_walk.walk(count, cached, first, block_kv=plan.block_kv, window=plan.sliding_window)
    begin, end = gpu_walk.split_range(walk.num_steps, split, plan.splits)
    wg = lax.axis_index("wg")

    @pl.when((wg < plan.compute_warpgroups) & (count > 0))
    def _compute() -> None:
        if plan.registers:
            plgpu.set_max_registers(plan.registers[0], action="increase")
        work = _Work(
            walk=walk,
            begin=begin,
            end=end,
            row=row,
            count=count,
            tile=tile,
            head=head,
            split=split,
            wg=wg,
        )
        _Attention(plan, a, s, work).run()

    @pl.when((wg == plan.compute_warpgroups) & (count > 0))
    def _move() -> None:
        if plan.registers:
            plgpu.set_max_registers(plan.registers[1], action="decrease")
        keys = gpu_fetch.Tile(walk, begin, end - begin, seq, a.starts[seq], head)
        fetcher = gpu_fetch.Fetcher(plan, a, s, keys)
        fetcher.fetch()

        # While the last blocks are computed with.
        @pl.when(split == 0)
        def _write() -> None:
            gpu_fetch.write_new_rows(plan, a, s, keys, walk.first_query, row, count)

        fetcher.drain()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What a compute warpgroup is to do.

    Attributes:
      walk: of the tile.
      begin, end: its steps that this block visits.
      row: of the tile's first token in q and out.
      count: tokens of the tile.
      tile, head, split: which block this is.
      wg: which warpgroup of it.
    """

    walk: gpu_walk.Walk
    begin: Int
    end: Int
    row: Int
    count: Int
    tile: Int
    head: Int
    split: Int
    wg: Int


class _Attention:
    """One compute warpgroup: its rows' softmax over the steps, and their output.

    Attributes:
      pair: whether two of them take turns: one's softmax runs beside the other's matmuls.
      before: tokens of the tile that other warpgroups have.
      tokens: those of this one.
    """

    def __init__(self, plan: Plan, a: Arrays, s: Scratch, work: _Work):
        self.plan, self.a, self.s, self.work = plan, a, s, work
        self.pair = plan.compute_warpgroups == 2
        self.before = work.wg * plan.warpgroup_tokens
        self.tokens = gpu_walk.clip(work.count - self.before, 0, plan.warpgroup_tokens)

    def run(self) -> None:
        """All of it."""
        plan, s, work = self.plan, self.s, self.work
        self._bring_queries()
        if self.pair:
            # They go half a step apart.
            pl.when(work.wg == 1)(self._rendezvous)
        steps = work.end - work.begin
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(s.k_full.at[0]))
        carry = (
            hopper.accumulator((ROWS, plan.head_dim), 0.0),
            hopper.per_row(ROWS, _MASKED),
            hopper.per_row(ROWS, 0.0),
        )
        acc, best, total = self._steps(carry)
        if self.pair:
            pl.when(work.wg == 0)(self._rendezvous)
        self._store(acc, best, total)

    def _bring_queries(self) -> None:
        """This warpgroup's queries, from device memory to where the tensor cores read them."""
        plan, a, s, work = self.plan, self.a, self.s, self.work
        wg, token_rows = work.wg, plan.token_rows

        @pl.loop(0, min(plan.warpgroup_tokens, plan.max_q_len))
        def _queries(i: Int) -> None:
            @pl.when(i < self.tokens)
            def _copy() -> None:
                plgpu.copy_gmem_to_smem(
                    a.q.at[work.row + self.before + i, pl.ds(work.head * plan.groups, token_rows)],
                    s.q_rows.at[wg, pl.ds(i * token_rows, token_rows)],
                    s.q_ready.at[wg],
                )

            pl.when(i >= self.tokens)(lambda: plgpu.barrier_arrive(s.q_ready.at[wg]))

        plgpu.barrier_wait(s.q_ready.at[wg])
        s.q_tile[wg] = hopper.load(s.q_rows.at[wg])
        plgpu.commit_smem()

    def _rendezvous(self) -> None:
        plgpu.barrier_arrive(self.s.turn)
        plgpu.barrier_wait(self.s.turn)

    def _steps(self, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """All steps, run by run (`gpu_walk.segments`): in a loop of their own those without a mask, which are
        nearly all of a long prompt's, know nothing of one."""
        plan, work = self.plan, self.work
        runs = gpu_walk.segments(
            *(work.walk, work.begin, work.end),
            block_kv=plan.block_kv,
            window=plan.sliding_window,
        )

        def one(run: Int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            first, masked, last = (
                functools.reduce(
                    lambda so_far, i: jnp.where(run == i, bounds[i], so_far),
                    range(1, len(runs)),
                    bounds[0],
                )
                for bounds in zip(*runs, strict=True)
            )
            step = self._step
            carry = lax.fori_loop(first, masked, lambda i, c: step(i, c, False), carry)
            return lax.fori_loop(masked, last, lambda i, c: step(i, c, True), carry)

        return lax.fori_loop(0, len(runs), one, carry)

    def _step(self, step: Int, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        """One step of the walk, whose keys are there: returns once the next one's are."""
        plan, s, work = self.plan, self.s, self.work
        acc, best, total = carry
        i = step - work.begin
        slot, following = lax.rem(i, plan.stages), lax.rem(i + 1, plan.stages)

        scores = hopper.matmul(
            s.q_tile.at[work.wg],
            s.k_ring.at[slot],
            transpose_b=True,
            then=self._rendezvous if self.pair else None,
        )
        plgpu.barrier_arrive(s.k_consumed.at[slot])
        if plan.softcap is None:
            scores *= plan.scale * _LOG2E
        else:
            # tanh(x) = 1 - 2 / (1 + e^2x): the hardware's own tanh is good to 11 bits only.
            e = jnp.exp2(scores * (2 * _LOG2E * plan.scale / plan.softcap))
            scores = (plan.softcap * _LOG2E) * (1.0 - 2.0 / (1.0 + e))
        if masked:
            scores = self._mask(scores, step)
        new_best = jnp.maximum(best, scores.max(axis=1))
        keep = jnp.exp2(best - new_best)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_best, scores.shape, [0]))
        total = total * keep + weights.sum(axis=1)
        weights = weights.astype(jnp.bfloat16)
        acc *= lax.broadcast_in_dim(keep, acc.shape, [0])
        if self.pair:
            self._rendezvous()

        def await_keys() -> None:
            more = step + 1 < work.end
            pl.when(more)(lambda: plgpu.barrier_wait(s.k_full.at[following]))

        plgpu.barrier_wait(s.v_full.at[slot])
        acc = hopper.add_product(acc, weights, s.v_ring.at[slot], then=await_keys)
        plgpu.barrier_arrive(s.v_consumed.at[slot])
        return acc, new_best, total

    def _mask(self, scores: jax.Array, step: Int) -> jax.Array:
        plan, walk = self.plan, self.work.walk
        block = gpu_walk.block_at(walk, step, block_kv=plan.block_kv)
        shape = (ROWS, plan.block_kv)
        column = hopper.iota(shape, 1)
        # Of each row the first column that it does not see: two numbers of a thread, not one a score.
        ahead = block.position - walk.first_query - self.before
        token = lax.div(hopper.row_indices(ROWS), plan.token_rows)
        end = jnp.minimum(token - ahead + 1, block.tail)
        visible = column < lax.broadcast_in_dim(end, shape, [0])
        if plan.sliding_window is not None:
            begin = token - (ahead + plan.sliding_window)
            visible &= column > lax.broadcast_in_dim(begin, shape, [0])
        return jnp.where(visible, scores, _MASKED)

    def _store(self, acc: jax.Array, best: jax.Array, total: jax.Array) -> None:
        """The rows' results, and with several splits their sums."""
        plan, a, s, work = self.plan, self.a, self.s, self.work
        total = jnp.where(total > 0, total, 1.0)
        stage: Ref = s.q_rows if s.out_rows is None else s.out_rows
        acc /= lax.broadcast_in_dim(total, acc.shape, [0])
        stage[work.wg] = acc.astype(plan.out_dtype)
        if s.lse_rows is not None:
            s.lse_rows[...] = best + jnp.log(total) * _LOG2E
        plgpu.commit_smem()

        @pl.loop(0, self.tokens)
        def _out(i: Int) -> None:
            plgpu.copy_smem_to_gmem(
                stage.at[work.wg, pl.ds(i * plan.token_rows, plan.groups)],
                a.out.at[
                    work.split,
                    work.row + self.before + i,
                    pl.ds(work.head * plan.groups, plan.groups),
                ],
            )

        if a.lse is not None and s.lse_rows is not None:
            plgpu.copy_smem_to_gmem(s.lse_rows, a.lse.at[work.split, work.tile, work.head])
        plgpu.wait_smem_to_gmem(0)
