"""The TPU kernel of the quantized matmul in jax's TPU interpreter, what it moves, and its blocks.

`make test` takes every seventh case of the table, `make test-long` all, with both block sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.quantized_matmul import shapes, tpu
from jblock.pallas_kernels.quantized_matmul.tpu import Blocks
from tests.pallas_kernels.quantized_cases import CASES, Case, hold
from tests.pallas_kernels.tpu_interpreter import FAST
from tests.pallas_kernels.traffic import Traffic, count

SMALL = Blocks(rows=16, columns=128)
SPREAD = CASES[1::7]
# These shapes the kernel leaves to the XLA backend; all others it serves.
LEFT = [c for c in CASES if c.width % 128 or (c.group and 128 % c.group and c.group % 128)]


@functools.partial(jax.jit, static_argnames="blocks", compiler_options=FAST)
def interpreted(x, w_q, scales, zeros, *, blocks=None):
    return tpu.quantized_matmul(
        x,
        w_q,
        scales,
        zeros,
        blocks=blocks,
        device_kind="none",
        interpret=pltpu.InterpretParams(),
    )


def test_it_serves_all_but_odd_widths():
    served = {c for c in CASES if tpu.serves(c.width, c.width // (c.group or c.width))}
    assert served == set(CASES) - set(LEFT) and len(served) >= 60


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_matches_reference(case):
    hold(case, functools.partial(interpreted, blocks=SMALL))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL, None], ids=["small", "heuristic"])
def test_every_case_matches_reference(case, blocks):
    hold(case, functools.partial(interpreted, blocks=blocks))


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    out=st.integers(1, 300),
    chunks=st.integers(1, 3),
    group=st.sampled_from([8, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_products(rows, out, chunks, group, bits, zeros, seed):
    case = Case(rows, out, chunks * 128, group, bits, zeros=zeros)
    hold(case, functools.partial(interpreted, blocks=SMALL), seed)


def traffic(model: shapes.Model, projection: str, rows: int, bits: int) -> Traffic:
    fn, args = shapes.program("tpu", model, projection, rows, bits, device_kind="none")
    return count(fn, *args)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("projection", ["up", "down"])
@pytest.mark.parametrize("rows", [1, 37])
def test_decoding_moves_little_more_than_it_must(projection, rows, bits):
    model = shapes.MODELS[0]
    got = traffic(model, projection, rows, bits)
    must, _ = shapes.needed(model, projection, rows, bits)
    assert must <= got.hbm_bytes <= 1.15 * must


@pytest.mark.parametrize("rows", [700])
def test_prefill_computes_little_more_than_it_must(rows):
    model = shapes.MODELS[0]
    got = traffic(model, "up", rows, 4)
    _, must = shapes.needed(model, "up", rows, 4)
    assert must <= got.flops <= 1.1 * must


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("rows", shapes.ROWS)
def test_the_heuristic_fits_vector_memory(model, rows):
    for width, out in model.projections.values():
        blocks = tpu.heuristic(tpu.Shape(rows=rows, width=width, out=out, group=128, bits=8))
        weights = blocks.columns * width
        held = 2 * blocks.rows * width * 2 + 2 * weights + 2 * blocks.rows * blocks.columns * 4
        assert held < 40 * 2**20


@pytest.mark.parametrize("change", [{"rows": 8}, {"columns": 100}, {"columns": 0}])
def test_blocks_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match="give rows a multiple of 16"):
        Blocks(**{"rows": 16, "columns": 128, **change})


@pytest.mark.parametrize("columns", [1, 128, 200, 512, 513, 600, 640, 768, 896, 1024, 1152])
def test_no_part_of_the_columns_is_one_register_behind_others(columns):
    """Mosaic loads no scale of such a part."""
    bounds = tpu.column_bounds(columns)
    parts = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == columns and min(parts) > 0 and max(parts) <= 512
    assert not any(begin % tpu.LANES for begin in bounds[:-1])
    assert len(parts) == 1 or min(parts) > tpu.LANES or columns % tpu.LANES


def test_a_scale_that_is_not_a_number_stays_in_its_column():
    case = Case(4, 256, 256, 64)
    from tests.pallas_kernels.quantized_cases import make

    x, w_q, scales, _ = make(case)
    poisoned = scales.at[5].set(jnp.nan)
    clean, dirty = (interpreted(x, w_q, s, None, blocks=SMALL) for s in (scales, poisoned))
    others = np.arange(256) != 5
    np.testing.assert_array_equal(np.asarray(clean)[:, others], np.asarray(dirty)[:, others])
    assert np.isnan(np.asarray(dirty)[:, 5]).all()
