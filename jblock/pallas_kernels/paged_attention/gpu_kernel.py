"""The Hopper kernel of ragged paged attention: what one CUDA block does (Mosaic GPU).

A block has one or two compute warpgroups, each with 64 rows of queries (tokens x heads of one KV head),
and one that moves memory (gpu_fetch.py). The softmax is online (FlashAttention, arXiv 2205.14135; the
ping-pong of two warpgroups: FlashAttention-3, arXiv 2407.08608). New keys and values are read from the call's
own arrays, never through the pages, so no block depends on what another one writes.

Of pages of 8 bits the values are widened to bfloat16, which holds them exactly, on their way from the ring to
where the tensor cores read them, while those are at work; scores and weights take the scales. Of two
warpgroups one widens the keys for both, the other the values: the turns that they take order it all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
        whole = 0
        if plan.scaled:
            # Pages come whole: no row of one is written while it is on its way.
            whole = gpu_walk.clip(walk.num_cached - begin, 0, end - begin)
            fetcher.drain(0, whole)

        # While the last blocks are computed with.
        @pl.when(split == 0)
        def _write() -> None:
            gpu_fetch.write_new_rows(plan, a, s, keys, walk.first_query, row, count)

        fetcher.drain(whole, end - begin)


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
        plan, work = self.plan, self.work
        self._bring_queries()
        if self.pair:
            # They go half a step apart.
            pl.when(work.wg == 1)(self._rendezvous)
        pl.when(work.end > work.begin)(lambda: self._await_keys(work.begin))
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
        slot = self._slot(step)
        # Added to indices: what compilers do not know to be the same in every step they do not keep in
        # registers throughout, such as two for each operand of a matmul's up to 16 instructions.
        zero = jnp.minimum(step - work.begin, 0)
        queries = s.q_tile.at[work.wg + zero]
        keys, values = s.k_ring.at[slot + zero], s.v_ring.at[slot + zero]
        if s.k_wide is not None and s.v_wide is not None:
            keys, values = s.k_wide.at[self._wide_slot(step) + zero], s.v_wide

        def meanwhile() -> None:
            if plan.scaled:
                self._by_one(1, lambda: self._widen_values(step, masked))
            if self.pair:
                self._rendezvous()

        scores = hopper.matmul(queries, keys, transpose_b=True, then=meanwhile)
        if s.k_ring_scales is not None:
            scale = hopper.load_columns(s.k_ring_scales.at[slot])
            scores *= lax.broadcast_in_dim(scale, scores.shape, [1])
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
        if plan.scaled:
            scale = self._value_scales(step, masked)
            weights *= lax.broadcast_in_dim(scale, weights.shape, [1])
        weights = weights.astype(jnp.bfloat16)
        acc *= lax.broadcast_in_dim(keep, acc.shape, [0])
        if self.pair:
            self._rendezvous()

        def await_next_keys() -> None:
            pl.when(step + 1 < work.end)(lambda: self._await_keys(step + 1))

        if not plan.scaled:
            plgpu.barrier_wait(s.v_full.at[slot])
        acc = hopper.add_product(acc, weights, values, then=await_next_keys)
        plgpu.barrier_arrive(s.v_consumed.at[slot])
        return acc, new_best, total

    def _slot(self, step: Int) -> Int:
        """Of the ring."""
        return lax.rem(step - self.work.begin, self.plan.stages)

    def _wide_slot(self, step: Int) -> Int:
        """Of the widened keys."""
        return lax.rem(step - self.work.begin, self.plan.wide_keys)

    def _by_one(self, wg: int, act: Callable[[], None]) -> None:
        """act(), by one warpgroup of two, or by the only one."""
        if self.pair:
            pl.when(self.work.wg == wg)(act)
        else:
            act()

    def _await_keys(self, step: Int) -> None:
        """Waits for a step's keys, and has those of 8 bits widened, to where the other warpgroup, which is
        half a step behind, reads none any more: it has multiplied by those of the step before the last."""
        s, slot = self.s, self._slot(step)
        plgpu.barrier_wait(s.k_full.at[slot])
        if s.k_wide is not None:
            wide = s.k_wide.at[self._wide_slot(step)]
            self._by_one(0, lambda: self._widen(s.k_ring.at[slot], wide))

    def _widen_values(self, step: Int, masked: bool) -> None:
        """Of a step, once they are there; zeros where nobody sees them: 0 x NaN is NaN."""
        s, slot = self.s, self._slot(step)
        plgpu.barrier_wait(s.v_full.at[slot])
        block = self._block(step) if masked else None
        self._widen(s.v_ring.at[slot], s.v_wide, block)

    def _widen(self, narrow: Ref, wide: Ref, seen: gpu_walk.Block | None = None) -> None:
        """A block [block_kv, d] of 8-bit values as bfloat16; zeros where `seen` says that nobody sees it."""
        width = hopper.swizzle_columns(self.plan.head_dim, jnp.bfloat16)

        # Unrolled, all loads would come first, and take as many registers.
        @pl.loop(0, self.plan.head_dim // width)
        def _columns(i: Int) -> None:
            for top in range(0, self.plan.block_kv, ROWS):
                part = pl.ds(top, ROWS), pl.ds(i * width, width)
                values = hopper.load_8_bits(narrow.at[part])
                if seen is not None:
                    key = hopper.iota((ROWS, width), 0) + top
                    mine = (key >= seen.head) & (key < seen.tail)
                    values = jnp.where(mine, values, jnp.bfloat16(0))
                wide[part] = values

        plgpu.commit_smem()

    def _value_scales(self, step: Int, masked: bool) -> jax.Array:
        """float32 [block_kv] of a step's values; 0 where nobody sees them, who may have NaN."""
        plan, s, slot = self.plan, self.s, self._slot(step)
        assert s.v_ring_scales is not None
        if self.pair:  # the other warpgroup has waited, to widen them
            pl.when(self.work.wg == 0)(lambda: plgpu.barrier_wait(s.v_full.at[slot]))
        scale = hopper.load_columns(s.v_ring_scales.at[slot])
        if masked:
            block, key = self._block(step), hopper.column_indices(plan.block_kv)
            scale = jnp.where((key >= block.head) & (key < block.tail), scale, 0.0)
        return scale

    def _block(self, step: Int) -> gpu_walk.Block:
        return gpu_walk.block_at(self.work.walk, step, block_kv=self.plan.block_kv)

    def _mask(self, scores: jax.Array, step: Int) -> jax.Array:
        plan, walk = self.plan, self.work.walk
        block = self._block(step)
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
