"""The Hopper kernels of the matmuls in the Mosaic GPU interpreter, on the shared cases in bfloat16.

What of the kernels the interpreter cannot run is in `mosaic_gpu_worker.py`. That they compile for an H200 is
shown by `test_mosaic_gpu_compiles`. `make test` runs a few cases, `make test-long` all, rounded to sizes that
many share (`grouped_cases`), and some in their own.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.pallas_kernels.grouped_block_matmul import mosaic_gpu as block_gpu
from jblock.pallas_kernels.grouped_delta_matmul import gpu_kernel, gpu_plan
from jblock.pallas_kernels.grouped_delta_matmul import mosaic_gpu as delta_gpu
from jblock.pallas_kernels.grouped_delta_matmul import shapes as delta_shapes
from jblock.pallas_kernels.models import MODELS
from jblock.pallas_kernels.quantized_matmul import mosaic_gpu as quantized_gpu
from jblock.pallas_kernels.quantized_matmul import shapes as quantized_shapes
from tests.pallas_kernels import mosaic_gpu_worker as worker
from tests.pallas_kernels.grouped_cases import (
    BLOCK_CASES,
    DELTA_CASES,
    BlockCase,
    DeltaCase,
    hold_block,
    hold_delta,
    make_delta,
)
from tests.pallas_kernels.quantized_cases import CASES as QUANTIZED_CASES
from tests.pallas_kernels.quantized_cases import Case as QuantizedCase
from tests.pallas_kernels.quantized_cases import hold as hold_quantized
from tests.pallas_kernels.quantized_cases import make as make_quantized


@pytest.fixture(scope="module")
def pool():
    with worker.start() as pool:
        yield pool


def put(pool, op, case, plan=None, **options):
    return pool.submit(worker.run_op, op, case, plan, **options).result(timeout=900)


QUICK_BLOCK = BlockCase((3, 0, 70), 192, 64, "bfloat16", padding=2)


def test_block_matches_reference(pool):
    put(pool, "grouped_block_matmul", QUICK_BLOCK)


@pytest.mark.long
@pytest.mark.parametrize("case", worker.served_grouped(BLOCK_CASES), ids=str)
def test_block_matches_reference_on_every_case(pool, case):
    put(pool, "grouped_block_matmul", case, rounded=True)


@pytest.mark.long
@pytest.mark.parametrize("case", worker.served_grouped(BLOCK_CASES)[::6], ids=str)
def test_block_matches_reference_in_sizes_of_its_own(pool, case):
    put(pool, "grouped_block_matmul", case)


QUICK_DELTA = DeltaCase(((3, 2), (4, 0), (9, 3)), 256, 192, dtype="bfloat16", padding=2, slack=2)
FUSED = {"input_parts": 1, "column_parts": 1}


@pytest.mark.parametrize("plan", [{"input_parts": 2, "column_parts": 2}, FUSED], ids=str)
def test_delta_matches_reference_and_moves_what_it_must(pool, plan):
    counted = put(pool, "grouped_delta_matmul", QUICK_DELTA, plan)
    items = (
        3  # rows 0 to 2 of block 0 with two pieces, row 7 and block 1 with three, in runs of two
    )
    pieces = 2 + 4 + 4
    read = 2 * (items * 8 * 256 + pieces * 8 * (256 + 192))
    written = 4 * (3 + 1 + 8) * 192  # rows with an adapter alone
    if plan != FUSED:
        sums = 4 * 2 * items * 8 * 48  # of two parts, by each of two parts of the columns
        read, written = read + 2 * sums, written + sums
    assert (counted["read"], counted["written"]) == (read, written)


@pytest.mark.long
@pytest.mark.parametrize("plan", [{}, FUSED], ids=str)
@pytest.mark.parametrize("case", worker.served_grouped(DELTA_CASES), ids=str)
def test_delta_matches_reference_on_every_case(pool, case, plan):
    put(pool, "grouped_delta_matmul", case, plan, rounded=True)


@pytest.mark.long
@pytest.mark.parametrize("case", worker.served_grouped(DELTA_CASES)[::6], ids=str)
def test_delta_matches_reference_in_sizes_of_its_own(pool, case):
    put(pool, "grouped_delta_matmul", case)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_matches_reference(pool, bits):
    case = QuantizedCase(5, 128, 512, bits=bits, x="bfloat16", zeros=bits == 4, padding=3)
    counted = put(pool, "quantized_matmul", case, {"parts": 2 if bits == 8 else 1})
    if bits == 8:  # numpy has a byte for each int4
        assert counted["read"] == 128 * 512 + 2 * 8 * 512, "weights and rows once"
        assert counted["written"] == 2 * 4 * 8 * 128, "two parts of the result"


@pytest.mark.long
@pytest.mark.parametrize("case", worker.served_quantized(QUANTIZED_CASES), ids=str)
def test_quantized_matches_reference_on_every_case(pool, case):
    put(pool, "quantized_matmul", case)


RACES = {
    "grouped_block_matmul": QUICK_BLOCK,
    "grouped_delta_matmul": QUICK_DELTA,
    "quantized_matmul": QuantizedCase(5, 128, 512, x="bfloat16"),
}


@pytest.mark.long
@pytest.mark.parametrize("op", RACES)
def test_has_no_data_race(pool, op):
    put(pool, op, RACES[op], detect_races=True)


def test_what_the_kernels_do_not_serve_goes_through_xla():
    """No interpreter here: a kernel would fail on this machine."""
    narrow = DeltaCase(((3, 1), (4, 2)), 40, 130)
    hold_delta(narrow, jax.jit(delta_gpu.grouped_delta_matmul))
    hold_block(BlockCase((3, 4)), jax.jit(block_gpu.grouped_block_matmul))
    hold_quantized(QuantizedCase(4, 72, 96, 32), jax.jit(quantized_gpu.quantized_matmul))


def test_what_the_kernels_serve():
    def quantized(**change):
        case = dataclasses.replace(QuantizedCase(4, x="bfloat16"), **change)
        return quantized_gpu.serves(*make_quantized(case)[:3])

    assert quantized() and quantized(bits=4) and quantized(rows=200) and quantized(group=64)
    assert not (quantized(x="float32") or quantized(group=32) or quantized(out=72))

    def delta(**change):
        case = dataclasses.replace(DeltaCase(((4, 1),), dtype="bfloat16"), **change)
        return delta_gpu.serves(*make_delta(case)[2:4])

    assert delta() and delta(rank=16)
    assert not (delta(dtype="float32") or delta(width=96) or delta(out=72) or delta(rank=4))


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 300), parts=st.integers(1, 16))
def test_parts_share_all_steps(total, parts):
    parts = min(parts, total)
    shares = [gpu_kernel.share(np.int32(total), np.int32(p), np.int32(parts)) for p in range(parts)]
    steps = [int(begin) + i for begin, count in shares for i in range(int(count))]
    assert steps == list(range(total)) and all(count > 0 for _, count in shares)


def quantized_plans():
    for model in MODELS:
        for width, out in model.projections.values():
            for rows in (1, 16, 64, *quantized_shapes.ROWS, 2048):
                for bits in (8, 4):
                    shape = dict(rows=rows, width=width, out=out, bits=bits)
                    yield shape, quantized_gpu.make_plan(group=min(128, width), **shape)


def test_quantized_plans_read_weights_once_and_fit_the_chip():
    for shape, plan in quantized_plans():
        assert plan.columns * plan.column_blocks == shape["out"]
        assert plan.inputs * plan.steps == shape["width"]
        assert plan.rows * plan.row_blocks >= shape["rows"] > plan.rows * (plan.row_blocks - 1)
        assert 1 <= plan.parts <= max(1, plan.steps // 4) and plan.stages >= 2
        step = plan.columns * plan.inputs * shape["bits"] // 8 + 2 * plan.rows * plan.inputs
        assert plan.stages * step + 4 * plan.rows * plan.columns <= 227 * 1024 - 2048
        if shape["rows"] <= 64:
            assert plan.row_blocks == 1, "a second block of rows would read the weights again"


def test_delta_plans_fit_the_chip():
    for model in MODELS:
        for width, out in model.projections.values():
            for rows, groups in (*delta_shapes.BATCHES.values(), (512, 512), (1, 1)):
                plan = delta_gpu.make_plan(
                    rows=rows, groups=groups, width=width, out=out, rank=8, turns=8
                )
                assert plan.input_parts <= plan.steps and plan.column_parts <= plan.column_blocks
                for half in (
                    (plan,)
                    if plan.fused
                    else (
                        dataclasses.replace(plan, expand=False),
                        dataclasses.replace(plan, shrink=False),
                    )
                ):
                    arrays = gpu_plan.scratch(half).values()
                    memory = [a for a in arrays if hasattr(a, "dtype")]
                    sizes = [
                        np.prod(a.shape) * np.dtype(a.dtype).itemsize for a in memory if a.shape
                    ]
                    assert sum(sizes) <= 227 * 1024 - 2048
    batch = dict(width=4096, out=4096, rank=8, turns=8)
    assert delta_gpu.make_plan(rows=256, groups=256, **batch).fused
    assert not delta_gpu.make_plan(rows=64, groups=32, **batch).fused
