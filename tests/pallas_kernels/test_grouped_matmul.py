"""The XLA backends of both grouped matmuls against their references, their arguments, and the items."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.pallas_kernels.grouped_block_matmul import api as block_api
from jblock.pallas_kernels.grouped_delta_matmul import api as delta_api
from jblock.pallas_kernels.groups import items
from tests.pallas_kernels.grouped_cases import (
    BLOCK_CASES,
    DELTA_CASES,
    BlockCase,
    DeltaCase,
    hold_block,
    hold_delta,
    make_block,
    make_delta,
)

BLOCK = jax.jit(functools.partial(block_api.grouped_block_matmul, backend="xla"))
DELTA = jax.jit(functools.partial(delta_api.grouped_delta_matmul, backend="xla"))


def spread(cases):
    """Every seventh case in `make test`, the others in `make test-long`."""
    return [
        pytest.param(c, marks=[pytest.mark.long] * (i % 7 > 0), id=str(c))
        for i, c in enumerate(cases)
    ]


def test_there_are_enough_cases():
    assert len(set(BLOCK_CASES)) == len(BLOCK_CASES) >= 60
    assert len(set(DELTA_CASES)) == len(DELTA_CASES) >= 60


@pytest.mark.parametrize("case", spread(BLOCK_CASES))
def test_block_matches_reference(case):
    hold_block(case, BLOCK)


@pytest.mark.parametrize("case", spread(DELTA_CASES))
def test_delta_matches_reference(case):
    hold_delta(case, DELTA)


SIZES = st.lists(st.integers(0, 40), min_size=3, max_size=3)


@settings(max_examples=8, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_block_matches_reference_on_random_groups(sizes, seed):
    # The padding makes all examples one program.
    hold_block(BlockCase(tuple(sizes), 24, 8, padding=121 - sum(sizes)), BLOCK, seed)


@settings(max_examples=8, deadline=None)
@given(
    sizes=SIZES, counts=st.lists(st.integers(0, 2), min_size=3, max_size=3), seed=st.integers(0, 99)
)
def test_delta_matches_reference_on_random_groups(sizes, counts, seed):
    groups = tuple(zip(sizes, counts, strict=True))
    case = DeltaCase(groups, 24, 8, rank=4, padding=121 - sum(sizes), slack=2 - max(counts))
    hold_delta(case, DELTA, seed)


CUT = jax.jit(items, static_argnums=(1, 2))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=5, max_size=5),
    wanted=st.lists(st.booleans(), min_size=5, max_size=5),
    block=st.sampled_from([4, 16]),
)
def test_items_hold_every_wanted_row_once(sizes, wanted, block):
    rows = 150
    todo = CUT(np.asarray(sizes, np.int32), rows, block, np.asarray(wanted))
    count = int(todo.count)
    assert count <= todo.block.size
    seen = [
        (int(todo.group[i]), int(todo.block[i]) * block + row)
        for i in range(count)
        for row in range(int(todo.first[i]), int(todo.last[i]))
    ]
    begins = np.cumsum([0, *sizes])
    assert seen == [
        (g, int(begins[g]) + i) for g, n in enumerate(sizes) if wanted[g] for i in range(n)
    ]
    assert all(int(todo.first[i]) < int(todo.last[i]) for i in range(count))
    assert int(todo.block.max()) <= (rows - 1) // block
    changed = np.asarray(todo.changes(todo.block))[:count]
    blocks = np.asarray(todo.block)[:count]
    assert changed.tolist() == [int(i == 0 or blocks[i] != blocks[i - 1]) for i in range(count)]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"weights": ()}, "weights is empty"),
        ({"weights": (jnp.zeros((128, 128)), jnp.zeros((128, 96)))}, "weights differ"),
        ({"weights": (jnp.zeros((128, 128), jnp.int8),) * 2}, "weights have dtype int8"),
        ({"x": jnp.zeros((7, 96))}, "do not fit"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, "is not one for each of 2 weights"),
    ],
)
def test_bad_arguments_of_block_are_refused(change, says):
    names = ("x", "weights", "group_sizes")
    good = dict(zip(names, make_block(BlockCase((3, 4))), strict=True))
    with pytest.raises(ValueError, match=says):
        block_api.grouped_block_matmul(**{**good, **change})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"y": jnp.zeros((7, 96))}, "do not fit"),
        ({"y": jnp.zeros((7, 128), jnp.bfloat16)}, "y has dtype bfloat16; give float32"),
        ({"a": jnp.zeros((16, 4, 128))}, "do not fit"),
        ({"a": jnp.zeros((16, 8, 128), jnp.bfloat16)}, "dtypes bfloat16, float32"),
        ({"pieces": jnp.zeros((3, 2), jnp.int32)}, r"want \[G, K\], \[G\]"),
    ],
)
def test_bad_arguments_of_delta_are_refused(change, says):
    names = ("y", "x", "a", "b", "pieces", "group_sizes")
    good = dict(zip(names, make_delta(DeltaCase(((3, 2), (4, 1)))), strict=True))
    with pytest.raises(ValueError, match=says):
        delta_api.grouped_delta_matmul(**{**good, **change})
