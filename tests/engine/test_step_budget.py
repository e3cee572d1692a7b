"""The batching policy, as arithmetic: limits, allowances, and that nobody waits for ever."""

import collections
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.engine.scheduling.step_budget import (
    PROMPT_SHARE,
    Times,
    allowances,
    batch_limits,
)


@st.composite
def times(draw) -> Times:
    """A block's measured times: any that do not fall."""
    sizes = draw(st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True))
    seconds = draw(
        st.lists(st.floats(1e-4, 1.0), min_size=len(sizes), max_size=len(sizes)).map(sorted)
    )
    return Times(tuple(sorted(sizes)), tuple(seconds))


blocks = st.lists(st.tuples(st.floats(1, 200), times()), min_size=1, max_size=8)


@settings(deadline=None)
@given(blocks, st.floats(1e-3, 10))
def test_limits_fit_the_budget_or_are_what_is_efficient(blocks, budget):
    wanted, table = zip(*blocks, strict=True)
    limits = batch_limits(wanted, table, budget)
    assert all(limit >= 1 for limit in limits)
    cost = sum(t.of(limit) for limit, t in zip(limits, table, strict=True) if limit > t.efficient)
    assert cost <= budget * (1 + 1e-6)


@settings(deadline=None)
@given(blocks, st.floats(1e-3, 10))
def test_nobody_is_held_when_all_fits(blocks, budget):
    wanted, table = zip(*blocks, strict=True)
    if sum(t.of(w) for w, t in blocks) <= budget:
        limits = batch_limits(wanted, table, budget)
        assert all(limit >= w for limit, w in zip(limits, wanted, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=8), times(), st.floats(1e-3, 10))
def test_shared_blocks_get_no_smaller_batches_than_private_ones(wanted, table, budget):
    limits = batch_limits(wanted, [table] * len(wanted), budget)
    by_wanted = [limit for _, limit in sorted(zip(wanted, limits, strict=True))]
    assert by_wanted == sorted(by_wanted)


@settings(deadline=None)
@given(times(), st.integers(1, 100))
def test_calls_carry_all_rows_in_the_least_time(table, rows):
    sizes = table.cover(rows)
    seconds = dict(zip(table.sizes, table.seconds, strict=True))
    assert sum(sizes) >= rows and sum(sizes[:-1]) < rows
    assert sum(seconds[size] for size in sizes) <= table.of(rows) * (1 + 1e-9)


def test_rows_are_cut_only_where_two_calls_cost_less_than_one():
    assert Times((1, 4), (1.0, 2.5)).cover(2) == (1, 1)
    assert Times((1, 4), (1.0, 1.9)).cover(2) == (4,)
    assert Times((1, 4), (1.0, 1.0)).cover(9) == (4, 4, 1)


def test_a_shared_block_gets_a_large_batch_and_a_private_one_a_small_one():
    """Sixteen rows of four chains, with time for two thirds of it."""
    layer = Times((1, 2, 4, 8, 16), (1.0, 1.5, 2.5, 4.5, 8.5))
    assert batch_limits([16, 4, 4, 4, 4], [layer] * 5, 12.0) == [8, 4, 4, 4, 4]
    assert batch_limits([16, 4, 4, 4, 4], [layer] * 5, 100.0)[0] >= 16


def test_a_batch_is_not_cut_where_every_call_costs_the_same():
    """Reading the weights is all it takes: two calls of half the rows take twice as long."""
    flat = Times((1, 8, 32), (1.0, 1.1, 1.3))
    assert batch_limits([32], [flat], 0.5) == [32]
    steep = Times((1, 8, 32), (1.0, 8.0, 32.0))
    assert batch_limits([32], [steep], 10.0) == [8]


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), times(), st.floats(1e-3, 1))
def test_a_row_waits_no_longer_than_those_before_it_take(arrivals, table, budget):
    """A queue served by its limit, first come first served, as an instance does."""
    queue, now = collections.deque(), 0
    while queue or now < len(arrivals):
        for _ in range(arrivals[now] if now < len(arrivals) else 0):
            queue.append((now, len(queue)))
        limit = batch_limits([max(len(queue), 1)], [table], budget)[0]
        for _ in range(min(limit, len(queue))):
            arrived, before = queue.popleft()
            assert now - arrived <= before
        now += 1


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1), max_size=8), st.floats(0.05, 1), st.floats(0, 5))
def test_every_prompt_gets_there_oldest_first(chunks, budget, decoding):
    """However much decodes, and whoever comes behind it."""
    seconds = max(budget - decoding, PROMPT_SHARE * budget)
    assert seconds >= PROMPT_SHARE * budget
    left, steps = list(chunks), 0
    while any(left):
        granted = allowances(left, seconds)
        assert sum(granted) <= seconds * (1 + 1e-9)
        oldest = next(i for i, need in enumerate(left) if need)
        assert granted[oldest] == min(left[oldest], seconds)
        left = [
            max(need - g, 0.0) if g < need else 0.0 for need, g in zip(left, granted, strict=True)
        ]
        steps += 1
    assert steps <= math.ceil(sum(chunks) / seconds * (1 + 1e-6)) + 1


@pytest.mark.parametrize(
    ("sizes", "seconds", "words"),
    [((), (), "one each"), ((2, 1), (1.0, 2.0), "ascending"), ((1, 2), (2.0, 1.0), "never fall")],
)
def test_times_that_make_no_sense_are_refused(sizes, seconds, words):
    with pytest.raises(ValueError, match=words):
        Times(sizes, seconds)
