"""The machine code of the grouped delta matmul against the reference, and that a row's bits are its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="the extra jblock[cpu] is not installed")

from jblock.pallas_kernels import backends
from jblock.pallas_kernels.grouped_delta_matmul import api
from tests.pallas_kernels.grouped_cases import DELTA_CASES, DeltaCase, hold_delta

DELTA = jax.jit(functools.partial(api.grouped_delta_matmul, backend="cpu"))
FLOAT32 = [c for c in DELTA_CASES if c.dtype == "float32"]


# bfloat16 tables are XLA's.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.long] * (i % 4 > 0), id=str(c))
        for i, c in enumerate(FLOAT32)
    ],
)
def test_matches_reference(case):
    hold_delta(case, DELTA)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_groups(sizes, counts, seed):
    groups = tuple(zip(sizes, counts, strict=True))
    case = DeltaCase(groups, 24, 8, rank=4, padding=121 - sum(sizes), slack=2 - max(counts))
    hold_delta(case, DELTA, seed)


def test_a_row_has_the_same_bits_whatever_its_neighbors_and_threads():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows, width, out = 96, 256, 320
    y, x, a, b = draw(rows, out), draw(rows, width), draw(9, 8, width), draw(9, 8, out)
    pieces = np.array([[1, 2, 3], [4, 0, 0], [0, 0, 0], [5, 6, 0], [7, 8, 1]], np.int32)
    sizes = np.array([1, 40, 9, 13, 30], np.int32)
    assert backends.module("grouped_delta_matmul", "cpu").__name__.endswith(".cpu")
    together = np.asarray(DELTA(y, x, a, b, pieces, sizes))
    begin = 0
    for mine, size in zip(pieces, sizes, strict=True):
        for row in range(begin, begin + size, 7):
            alone = DELTA(
                y[row : row + 1], x[row : row + 1], a, b, mine[None], np.ones(1, np.int32)
            )
            np.testing.assert_array_equal(np.asarray(alone)[0], together[row])
        if not mine.any():
            np.testing.assert_array_equal(together[begin : begin + size], y[begin : begin + size])
        begin += size
    np.testing.assert_array_equal(together[begin:], y[begin:])  # rows of no group
