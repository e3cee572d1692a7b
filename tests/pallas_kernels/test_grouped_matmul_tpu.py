"""The TPU kernels of both grouped matmuls in jax's TPU interpreter, and what they move and multiply.

`make test` takes a spread of the tables, `make test-long` all: with small blocks and, rounded to sizes that
many cases share, with the heuristic's.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.pallas_kernels import groups
from jblock.pallas_kernels.grouped_block_matmul import shapes as block_shapes
from jblock.pallas_kernels.grouped_block_matmul import tpu as block_tpu
from jblock.pallas_kernels.grouped_delta_matmul import shapes as delta_shapes
from jblock.pallas_kernels.grouped_delta_matmul import tpu as delta_tpu
from jblock.pallas_kernels.models import MODELS
from tests.pallas_kernels.grouped_cases import (
    BLOCK_CASES,
    DELTA_CASES,
    GROUPS,
    BlockCase,
    DeltaCase,
    hold_block,
    hold_delta,
)
from tests.pallas_kernels.tpu_interpreter import FAST, INTERPRET, RACE
from tests.pallas_kernels.traffic import count

SMALL_BLOCK = block_tpu.Blocks(rows=16, columns=128)
SMALL_DELTA = delta_tpu.Blocks(rows=16, pieces=2)


@functools.partial(jax.jit, static_argnames="blocks", compiler_options=FAST)
def block(*args, blocks=None):
    return block_tpu.grouped_block_matmul(
        *args, blocks=blocks, device_kind="none", interpret=INTERPRET
    )


@functools.partial(jax.jit, static_argnames="blocks", compiler_options=FAST)
def delta(*args, blocks=None):
    return delta_tpu.grouped_delta_matmul(
        *args, blocks=blocks, device_kind="none", interpret=INTERPRET
    )


# Edges of groups in a block of rows, NaN of a variant that others follow there, many variants and columns.
BLOCK_SPREAD = [
    BlockCase((33, 2, 0, 29), padding=5),
    BlockCase((5, 4, 6), dtype="bfloat16", padding=3, poisoned=1),
    BlockCase((2,) * 24, 128, 256),
]
DELTA_SPREAD = [
    DeltaCase(GROUPS[5], padding=3, poisoned=3),
    DeltaCase(GROUPS[2], 96, 72, dtype="bfloat16"),
]


def test_the_spreads_are_of_the_tables():
    assert set(BLOCK_SPREAD) <= set(BLOCK_CASES) and set(DELTA_SPREAD) <= set(DELTA_CASES)


@pytest.mark.parametrize("case", BLOCK_SPREAD, ids=str)
def test_block_matches_reference(case, capfd):
    hold_block(case, functools.partial(block, blocks=SMALL_BLOCK))
    assert RACE not in "".join(capfd.readouterr())


@pytest.mark.parametrize("case", DELTA_SPREAD, ids=str)
def test_delta_matches_reference(case, capfd):
    hold_delta(case, functools.partial(delta, blocks=SMALL_DELTA))
    assert RACE not in "".join(capfd.readouterr())


@pytest.mark.long
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL_BLOCK, None], ids=["small", "heuristic"])
def test_block_matches_reference_on_every_case(case, blocks, capfd):
    # jax's interpreter takes a masked store of more rows than columns for one that is out of bounds.
    rows = min(sum(case.sizes) + case.padding, 256)
    enough = next(n for n in (37, 128, 256) if n >= rows)
    case = dataclasses.replace(case, out=max(case.out, enough))
    hold_block(case, functools.partial(block, blocks=blocks), rounded=blocks is None)
    assert RACE not in "".join(capfd.readouterr())


@pytest.mark.long
@pytest.mark.parametrize("case", DELTA_CASES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL_DELTA, None], ids=["small", "heuristic"])
def test_delta_matches_reference_on_every_case(case, blocks, capfd):
    hold_delta(case, functools.partial(delta, blocks=blocks), rounded=blocks is None)
    assert RACE not in "".join(capfd.readouterr())


SIZES = st.lists(st.integers(0, 20), min_size=3, max_size=3)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_block_matches_reference_on_random_groups(sizes, seed):
    case = BlockCase(tuple(sizes), 128, 256, padding=61 - sum(sizes))
    hold_block(case, functools.partial(block, blocks=SMALL_BLOCK), seed)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES, counts=st.lists(st.integers(0, 3), min_size=3, max_size=3), seed=st.integers(0, 99)
)
def test_delta_matches_reference_on_random_groups(sizes, counts, seed):
    groups = tuple(zip(sizes, counts, strict=True))
    case = DeltaCase(groups, padding=61 - sum(sizes), slack=3 - max(counts))
    hold_delta(case, functools.partial(delta, blocks=SMALL_DELTA), seed)


LLAMA = MODELS[0]
MIXTRAL = next(m for m in MODELS if m.experts == 8)
LONG = pytest.mark.long
RNG = np.random.default_rng(0)


def block_traffic(model, projection, tokens, sizes):
    fn, (x, weights, _) = block_shapes.program("tpu", model, projection, tokens, device_kind="none")
    return x.shape[0], count(fn, x, weights, np.asarray(sizes, np.int32))


@pytest.mark.parametrize("projection", [pytest.param("up", marks=LONG), "down"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((16,) * 8, marks=LONG, id="even"),
        pytest.param((40, 3, 0, 21, 30, 0, 1, 33), id="ragged"),
    ],
)
def test_decoded_experts_move_little_more_than_they_must(projection, sizes):
    rows, got = block_traffic(MIXTRAL, projection, 64, sizes)
    must, _ = block_shapes.needed(MIXTRAL, projection, rows, sizes)
    assert must <= got.hbm_bytes <= 1.15 * must


def test_variants_without_rows_are_not_read():
    _, all_of_one = block_traffic(LLAMA, "q", 64, (64, 0, 0, 0, 0, 0, 0, 0))
    must, _ = block_shapes.needed(LLAMA, "q", 64, (64,))
    assert all_of_one.hbm_bytes <= 1.15 * must


@pytest.mark.long
@pytest.mark.parametrize(
    "model, tokens", [(MIXTRAL, 2048), (LLAMA, 2048)], ids=["experts", "fine-tunes"]
)
def test_prefill_of_variants_computes_little_more_than_it_must(model, tokens):
    rows = tokens * (model.top_k or 1)
    cuts = np.sort(RNG.integers(0, rows, 7))
    sizes = np.diff([0, *cuts, rows])
    _, got = block_traffic(model, "up", tokens, sizes)
    _, must = block_shapes.needed(model, "up", rows, sizes)
    # What is at an edge is multiplied once, in a window that is little larger.
    assert must <= got.flops <= 1.1 * must
    assert got.outside_flops == 0


def delta_traffic(projection, sizes, counts):
    fn, (y, x, a, b, *_) = delta_shapes.program(
        "tpu", LLAMA, projection, sum(sizes), len(sizes), device_kind="none"
    )
    pieces = np.zeros((len(sizes), delta_shapes.TURNS), np.int32)
    nth = 1
    for g, number in enumerate(counts):
        pieces[g, :number] = np.arange(nth, nth + number)
        nth += number
    return count(fn, y, x, a, b, pieces, np.asarray(sizes, np.int32))


@pytest.mark.parametrize(
    "projection", ["k", pytest.param("up", marks=LONG), pytest.param("down", marks=LONG)]
)
def test_decoded_adapters_move_little_more_than_they_must(projection):
    # 32 adapters of ranks 8 to 64 on 64 rows, and a base without any.
    sizes, counts = (2,) * 31 + (1, 1), (*RNG.choice([1, 2, 4, 8], 32), 0)
    got = delta_traffic(projection, sizes, counts)
    must, _ = delta_shapes.needed(LLAMA, projection, sizes, counts)
    assert must <= got.hbm_bytes <= 1.15 * must


def test_prefill_of_adapters_computes_little_more_than_it_must():
    sizes, counts = (700, 1000, 48, 300), (2, 1, 4, 0)
    got = delta_traffic("up", sizes, counts)
    moved, must = delta_shapes.needed(LLAMA, "up", sizes, counts)
    assert must <= got.flops <= 1.1 * must
    assert moved <= got.hbm_bytes <= 1.15 * moved


def test_rows_without_adapters_cost_nothing():
    got = delta_traffic("q", (64,), (0,))
    assert got.grid_steps == 1 and got.flops == 0


@pytest.mark.parametrize("cut", [groups.even_windows, groups.doubling_windows])
@pytest.mark.parametrize("size, part", [(256, 16), (128, 8), (96, 8), (60, 16), (16, 16), (8, 16)])
def test_windows_hold_any_number_of_rows(cut, size, part):
    windows = cut(size, part)
    assert windows == sorted(set(windows)) and windows[-1] == size
    assert all(w % part == 0 for w in windows[:-1]) and len(windows) <= 12


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_heuristics_fit_vector_memory(model):
    for width, out in model.projections.values():
        for rows in (16, 64, 4096):
            shape = block_tpu.Shape(rows=rows, variants=8, width=width, out=out, dtype="bfloat16")
            b = block_tpu.heuristic(shape)
            held = 4 * (b.rows + b.columns) * width + 8 * b.rows * b.columns
            assert held < 40 * 2**20
            shape = delta_tpu.Shape(
                rows=rows, groups=4, width=width, out=out, rank=8, turns=8, dtype="bfloat16"
            )
            d = delta_tpu.heuristic(shape)
            held = d.rows * (16 * out + 4 * width) + 4 * d.pieces * 8 * (width + out)
            assert held < 40 * 2**20


@pytest.mark.parametrize(
    "make, change",
    [
        (block_tpu.Blocks, {"rows": 8, "columns": 128}),
        (block_tpu.Blocks, {"rows": 16, "columns": 100}),
        (delta_tpu.Blocks, {"rows": 12, "pieces": 1}),
        (delta_tpu.Blocks, {"rows": 16, "pieces": 0}),
    ],
)
def test_blocks_that_cannot_be_are_refused(make, change):
    with pytest.raises(ValueError, match="give rows a multiple of"):
        make(**change)
