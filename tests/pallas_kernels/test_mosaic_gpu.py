"""The Hopper kernel in the Mosaic GPU interpreter on the shared cases, and its index arithmetic on its own.

Which cases run as their nearest neighbor, and what of the kernel the interpreter cannot run, is in
`mosaic_gpu_worker.py`. That the kernel compiles for an H200 is shown by `test_mosaic_gpu_compiles`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.pallas_kernels.paged_attention import gpu_plan, gpu_walk, mosaic_gpu, shapes
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from tests.pallas_kernels import attention_cases, faults
from tests.pallas_kernels import mosaic_gpu_worker as worker
from tests.pallas_kernels.attention_cases import CASES, LONG, Case, check
from tests.pallas_kernels.tpu_interpreter import FAST

SERVED = list(dict.fromkeys(worker.served(c) for c in CASES))

# A case takes seconds to interpret, most of them to compile; so few of the table run every time.
QUICK = [
    *(
        worker.served(c)
        for c in CASES
        if c in (Case(LONG, window=30), Case(((0, 70), (33, 40)), page_size=16))
    ),
    Case(((150, 1), (0, 1), (97, 1)), kv="int8", page_size=64, head_dim=32),
    # Two computing warpgroups, of which each widens for the other.
    Case(((0, 70), (70, 40)), heads=8, kv="float8_e4m3fn", page_size=64, head_dim=32),
]

SPLIT = Case(((100, 1), (0, 0), (200, 1), (3, 1)), "grid", kv="bfloat16", page_size=16)


@pytest.fixture(scope="module")
def pool():
    with worker.start() as pool:
        yield pool


def put(pool, case, **kwargs):
    result = pool.submit(worker.run, case, **kwargs).result(timeout=900)
    check(case, result.got, result.wanted, 1e-2)
    assert not result.races
    return result


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_matches_reference(pool, case):
    put(pool, case)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_of_one_token_would_be_caught(fault):
    """By the cases of `make test`."""
    assert faults.caught(faults.FAULTS[fault], QUICK)


@pytest.mark.long
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_matches_reference_on_every_case(pool, case):
    put(pool, case, rounded=True)


@pytest.mark.long
@pytest.mark.parametrize("case", SERVED[4::16], ids=str)
def test_matches_reference_in_sizes_of_its_own(pool, case):
    put(pool, case)


@pytest.mark.long
def test_splits_of_the_keys_are_combined(pool):
    put(pool, SPLIT, plan={"splits": 3, "stages": 2})


@pytest.mark.long
@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("window", [None, 100])
def test_any_number_of_splits_gives_the_same(pool, splits, window):
    put(
        pool,
        Case(SPLIT.sequences, "grid", kv="bfloat16", window=window),
        plan={"splits": splits},
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [Case(((5, 40), (70, 3)), kv="bfloat16"), SPLIT, *QUICK[2:]], ids=str
)
def test_has_no_data_race(pool, case):
    put(pool, case, detect_races=True)


MODEL = dict(heads=8, kv_heads=2, head_dim=64, page_size=64, kv="bfloat16", q="bfloat16")


@pytest.mark.parametrize(
    "window", [None, *(pytest.param(n, marks=pytest.mark.long) for n in (256, 1024))]
)
def test_decoding_moves_little_more_than_it_must(pool, window):
    sequences = ((2000, 1), (1517, 1), (1130, 1))
    case = Case(sequences, "grid", **MODEL, window=window)
    # Without a window, nine blocks share the keys of each.
    result = put(pool, case)
    kept = sum(min(c, (window or c + 1) - 1) for c, _ in sequences)
    kv = 2 * 2 * 64 * 2 * (kept + 2 * len(sequences))  # the new tokens are read and written
    rows = 2 * 8 * 64 * 2 * len(sequences)  # queries and results
    assert kv + rows <= result.read + result.written <= 1.15 * (kv + rows)


@pytest.mark.long
def test_prefill_multiplies_little_more_than_it_must(pool):
    result = put(pool, Case(((0, 2048),), "grid", **{**MODEL, "heads": 4, "kv_heads": 1}))
    needed = 4 * 4 * 64 * (2048 * 2049 // 2)
    assert needed <= result.flops <= 1.1 * needed


def ragged_of(lengths, max_q_len):
    q_lens = jnp.asarray([n for _, n in lengths], jnp.int32)
    return Ragged(
        row_starts=jnp.asarray(np.cumsum([0, *q_lens[:-1]]), jnp.int32),
        q_lens=q_lens,
        kv_lens=jnp.asarray([c + n for c, n in lengths], jnp.int32),
        page_table=jnp.zeros((len(lengths), 1), jnp.int32),
        max_q_len=max_q_len,
    )


ROWS = 100  # of every batch below, so that they share a program
TILE_TABLE = jax.jit(gpu_walk.tile_table, static_argnums=(1, 2), compiler_options=FAST)
NEW_ROWS = jax.jit(gpu_walk.new_rows, static_argnums=1, compiler_options=FAST)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 23)), min_size=4, max_size=4),
    tile_tokens=st.sampled_from([1, 7, 32]),
)
def test_tiles_hold_every_new_token_once(lengths, tile_tokens):
    table = np.asarray(TILE_TABLE(ragged_of(lengths, 25), ROWS, tile_tokens))
    row_starts = np.cumsum([0] + [n for _, n in lengths])
    seen = []
    for seq, row, count, cached, first in table.tolist():
        assert 0 <= count <= tile_tokens and 0 <= seq < len(lengths)
        if count:
            assert (row, cached) == (row_starts[seq] + first, lengths[seq][0])
        seen += [(seq, first + i) for i in range(count)]
    assert sorted(seen) == [(s, i) for s, (_, n) in enumerate(lengths) for i in range(n)]


@settings(max_examples=400, deadline=None)
@given(
    cached=st.integers(0, 40),
    first=st.integers(0, 20),
    count=st.integers(0, 9),
    window=st.sampled_from([None, 1, 3, 8, 21]),
    block_kv=st.sampled_from([4, 8]),
    page_size=st.sampled_from([2, 4, 8, 16]),
    splits=st.integers(1, 4),
)
def test_walk_visits_what_is_visible_and_no_page_more(
    cached, first, count, window, block_kv, page_size, splits
):
    walk = gpu_walk.walk(count, cached, first, block_kv=block_kv, window=window)
    queries = range(cached + first, cached + first + count)
    visible = {
        key for p in queries for key in range(max(0, p - window + 1) if window else 0, p + 1)
    }
    piece = min(page_size, block_kv)
    ranges = [gpu_walk.split_range(walk.num_steps, i, splits) for i in range(splits)]
    steps = [i for begin, end in ranges for i in range(begin, end)]
    assert steps == list(range(walk.num_steps))

    shown, pages = [], set()
    for step in steps:
        block = gpu_walk.block_at(walk, step, block_kv=block_kv)
        keys = range(block.position + block.head, block.position + block.tail)
        shown += [(key, block.is_new) for key in keys]
        if not block.is_new:
            for offset in range(0, block_kv, piece):
                if gpu_walk.piece_is_read(block, offset, piece):
                    pages.add((block.position + offset) // page_size)
        # A block that needs no mask is one that every query of the tile sees all of.
        if not gpu_walk.needs_mask(walk, block, block_kv=block_kv, window=window):
            every = range(block.position, block.position + block_kv)
            assert all(
                k <= p and (window is None or k > p - window) for p in queries for k in every
            )
            assert list(keys) == list(every)
    assert len(shown) == len(set(shown))
    assert {key for key, _ in shown} == visible if count else not shown
    assert all(is_new == (key >= cached) for key, is_new in shown)
    assert pages == {key // page_size for key in visible if key < cached}


@settings(max_examples=400, deadline=None)
@given(
    cached=st.integers(0, 40),
    first=st.integers(0, 20),
    count=st.integers(1, 9),
    window=st.sampled_from([None, 1, 3, 8, 21]),
    block_kv=st.sampled_from([4, 8]),
    splits=st.integers(1, 4),
)
def test_runs_without_a_mask_are_the_blocks_that_need_none(
    cached, first, count, window, block_kv, splits
):
    walk = gpu_walk.walk(count, cached, first, block_kv=block_kv, window=window)
    for split in range(splits):
        begin, end = gpu_walk.split_range(walk.num_steps, split, splits)
        runs = gpu_walk.segments(walk, begin, end, block_kv=block_kv, window=window)
        found = []
        for start, masked, last in runs:
            found += [(i, False) for i in range(start, masked)]
            found += [(i, True) for i in range(masked, last)]
        assert [i for i, _ in found] == list(range(begin, end))
        for i, masked in found:
            block = gpu_walk.block_at(walk, i, block_kv=block_kv)
            assert masked == bool(
                gpu_walk.needs_mask(walk, block, block_kv=block_kv, window=window)
            )


def test_tiles_that_see_most_keys_come_first():
    ragged = ragged_of([(500, 7), (0, 30), (40, 23)], 30)
    table = np.asarray(TILE_TABLE(ragged, 60, 8))
    keys = np.where(table[:, 2] > 0, table[:, 2:].sum(axis=1), 0)
    assert keys.tolist() == sorted(keys.tolist(), reverse=True) and keys[0] == 507


WRITE_SCALES = jax.jit(mosaic_gpu.write_scales)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=3, max_size=3),
    gap=st.integers(0, 2),
)
def test_scales_go_where_their_tokens_are(lengths, gap):
    page_size, heads = 4, 2
    ragged = ragged_of(lengths, 4)
    starts = np.cumsum([gap] + [n + gap for _, n in lengths[:-1]])
    table = 1 + np.arange(12, dtype=np.int32).reshape(3, 4)
    ragged = dataclasses.replace(
        ragged, row_starts=jnp.asarray(starts, jnp.int32), page_table=jnp.asarray(table)
    )
    rows = 24
    new = np.arange(1, 1 + rows * heads, dtype=np.float32).reshape(rows, heads)
    wanted = np.zeros((14, heads, page_size), np.float32)
    for s, (cached, n) in enumerate(lengths):
        for i in range(n):
            page, slot = divmod(cached + i, page_size)
            wanted[table[s, page], :, slot] = new[starts[s] + i]
    got = WRITE_SCALES(jnp.zeros(wanted.shape), jnp.asarray(new), ragged)
    np.testing.assert_array_equal(got, wanted)


def test_walk_is_the_same_traced():
    made = gpu_walk.walk(*jnp.asarray([3, 50, 7]), block_kv=16, window=20)
    assert [int(x) for x in vars(made).values()] == list(
        vars(gpu_walk.walk(3, 50, 7, block_kv=16, window=20)).values()
    )


SHAPE = dict(
    rows=64, heads=32, kv_heads=8, head_dim=128, page_size=64, max_pages=64, num_seqs=64, max_q_len=1,
    kv_dtype="bfloat16", sliding_window=None, softcap=None, scale=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        ({"page_size": 4}, "page_size 4"),
        ({"page_size": 96}, "page_size 96"),
        ({"page_size": 32, "kv_dtype": "int8"}, "KV of int8, page_size 32"),
        ({"head_dim": 48, "kv_dtype": "int8"}, "KV of int8, .* KV heads of 48"),
        ({"kv_dtype": "float32"}, "KV of float32"),
        ({"head_dim": 24}, "KV heads of 24"),
        ({"heads": 128, "kv_heads": 1}, "128 heads"),
    ],
)
def test_what_it_does_not_serve_is_refused(change, says):
    with pytest.raises(NotImplementedError, match=says):
        mosaic_gpu.make_plan(**{**SHAPE, **change})


@pytest.mark.parametrize(
    "case",
    [
        Case(((7, 1), (0, 3)), page_size=8),  # of float32
        Case(((7, 1), (0, 3)), page_size=8, kv="int8"),
    ],
    ids=str,
)
def test_pages_it_does_not_serve_are_xlas(case):
    """No interpreter here: the kernel would fail on this machine."""

    @functools.partial(
        jax.jit, static_argnames=("sliding_window", "softcap", "scale"), compiler_options=FAST
    )
    def attend(*args, scale, **options):
        scale = case.head_dim**-0.5 if scale is None else scale
        return mosaic_gpu.paged_attention(*args, scale=scale, **options)

    got, wanted = attention_cases.run(case, mosaic_gpu.abstract_pages, attend)
    check(case, got, wanted)


def test_plans_fill_the_chip():
    assert mosaic_gpu.make_plan(**SHAPE).splits == 1
    alone = mosaic_gpu.make_plan(**{**SHAPE, "rows": 1, "num_seqs": 1})
    assert alone.splits == 16, "256 keys each of 4096"
    near = mosaic_gpu.make_plan(**{**SHAPE, "rows": 1, "num_seqs": 1, "sliding_window": 1024})
    assert near.splits == 4, "256 keys each of the window"
    prefill = mosaic_gpu.make_plan(**{**SHAPE, "rows": 2048, "num_seqs": 2, "max_q_len": 1024})
    assert (prefill.compute_warpgroups, prefill.block_kv, prefill.tile_tokens) == (2, 128, 32)


def memory(plan):
    """Shared memory of a block as jax allots it: buffers in whole 1024 bytes, what reductions take, and room
    for barriers."""
    made = [a for a in gpu_plan.scratch(plan).values() if hasattr(a, "dtype") and a.shape]
    sizes = [np.prod(a.shape) * np.dtype(a.dtype).itemsize for a in made]
    return sum(-(-n // 1024) * 1024 for n in sizes) + 2048 + 512


@pytest.mark.parametrize("kv", ["bfloat16", "int8", "float8_e4m3fn"])
def test_plans_fit_the_chip(kv):
    for model in shapes.MODELS:
        for batch in shapes.BATCHES:
            plan = mosaic_gpu.make_plan(
                **{k: getattr(model, k) for k in ("heads", "kv_heads", "head_dim", "softcap")},
                **{k: getattr(batch, k) for k in ("rows", "num_seqs", "max_q_len")},
                page_size=shapes.PAGE_SIZE,
                max_pages=batch.max_len // shapes.PAGE_SIZE,
                kv_dtype=kv,
                sliding_window=model.window,
                scale=1.0,
            )
            assert memory(plan) <= 227 * 1024, (model.name, batch.name)
            assert plan.stages >= 1 and plan.scaled == (kv != "bfloat16")
            if plan.compute_warpgroups == 2:
                compute, move = plan.registers
                assert 2 * compute + move <= 3 * gpu_plan.LAUNCH_REGISTERS


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_plans_of_every_width_fit_the_chip(kv):
    for head_dim in (d for d in range(16, 257, 16) if mosaic_gpu.serves(64, d, kv)):
        for groups in (1, 3, 8, 16):
            if gpu_plan.token_rows(groups, head_dim) > gpu_plan.ROWS:
                continue
            for max_q_len in (1, 5, 16, 256):
                made = {"heads": 2 * groups, "kv_heads": 2, "head_dim": head_dim, "kv_dtype": kv}
                size = {"rows": 4 * max_q_len, "num_seqs": 4, "max_q_len": max_q_len}
                plan = mosaic_gpu.make_plan(**{**SHAPE, **made, **size})
                assert memory(plan) <= 227 * 1024, (head_dim, groups, max_q_len)
                assert plan.stages >= 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=3, max_size=3),
    gaps=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    max_q_len=st.sampled_from([23, 30]),
)
def test_new_rows_begin_where_tma_has_a_tile(lengths, gaps, order, max_q_len):
    starts, rows = [0] * 3, 0
    for s in order:
        starts[s] = rows + gaps[s]
        rows = starts[s] + lengths[s]
    rows = ROWS
    ragged = dataclasses.replace(
        ragged_of([(5, n) for n in lengths], max_q_len), row_starts=jnp.asarray(starts, jnp.int32)
    )
    begins, taken = NEW_ROWS(ragged, rows)
    taken = np.arange(rows) if taken is None else np.asarray(taken)
    assert len(taken) <= 8 or len(taken) % 8 == 0
    for begin, start, n in zip(np.asarray(begins).tolist(), starts, lengths, strict=True):
        if n:
            assert begin % 8 == 0 or len(taken) <= 8
            assert taken[begin : begin + n].tolist() == list(range(start, start + n))


@pytest.mark.parametrize("max_q_len, moved", [(1, False), (2, False), (5, True), (24, False)])
def test_new_rows_of_a_grid_stay_where_tiles_have_them(max_q_len, moved):
    zeros = jnp.zeros(12, jnp.int32)
    ragged = Ragged.grid(zeros, zeros + max_q_len, zeros[:, None], max_q_len)
    begins, taken = gpu_walk.new_rows(ragged, 12 * max_q_len)
    assert (taken is not None) == moved
    for begin in np.asarray(begins).tolist():
        assert begin % 8 + max_q_len <= 8 or begin % 8 == 0
