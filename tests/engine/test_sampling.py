"""Sampling against a plain numpy reading of what it should keep and pick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.engine.programs import sampling

keep_top = jax.jit(sampling.keep_top)


def kept_by_sorting(logits, top_k, top_p):
    """The reference: sort, cut, accumulate. Ties with the last one kept stay."""
    order = np.argsort(-logits)
    best = logits[order]
    keep = logits >= best[top_k - 1] if top_k else np.ones(len(logits), bool)
    if top_p < 1:
        left = np.where(keep, logits, -np.inf)
        probs = np.exp(left - left.max())
        probs /= probs.sum()
        ranked = np.sort(probs)[::-1]
        last = ranked[np.searchsorted(np.cumsum(ranked), top_p)]
        keep &= probs >= last
    return keep


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_keeps_what_sorting_keeps(seed, top_k, top_p, scale):
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * scale
    got = keep_top(logits[None], jnp.array([top_k]), jnp.array([top_p], jnp.float32))
    np.testing.assert_array_equal(np.asarray(got)[0], kept_by_sorting(logits, top_k, top_p))


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.2, 1.0])
def test_min_p_is_a_share_of_the_best_probability(min_p):
    logits = np.random.default_rng(3).normal(size=(4, 30)).astype(np.float32) * 2
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))  # Of the best: 1.
    got = sampling.keep_min_p(logits, np.full(4, min_p, np.float32))
    np.testing.assert_array_equal(np.asarray(got), probs >= min_p)
    rows = [options(1.0, 0, 1.0, seed, min_p) for seed in range(4)]
    tokens = sample(logits, rows, [0, 1, 2, 3])[:, 0]
    assert (probs[np.arange(4), tokens] >= min_p).all()


def test_top_k_keeps_ties():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0]])
    keep = sampling.keep_top(logits, jnp.array([1]), jnp.array([1.0]))
    assert np.asarray(keep).tolist() == [[False, True, True, False]]


def options(temperature, top_k, top_p, seed, min_p=0.0):
    """One row of the option array."""
    floats = np.array([temperature, top_p, min_p], np.float32).view(np.int32)
    return [floats[0], top_k, floats[1], np.array(seed, np.uint32).view(np.int32), floats[2]]


def sample(logits, rows, positions):
    """Tokens of one call with the given option rows."""
    meta = np.zeros((len(rows), 4), np.int32)
    meta[:, 0], meta[:, 1], meta[:, 3] = positions, 1, np.arange(len(rows))
    last = jnp.zeros(len(rows), jnp.int32)
    last, packed = jax.jit(sampling.sampled)(logits, logits, last, meta, np.array(rows, np.int32))
    np.testing.assert_array_equal(np.asarray(last), np.asarray(packed)[:, 0])
    return np.asarray(packed)


def test_draws_follow_the_distribution():
    probs = np.array([0.5, 0.25, 0.15, 0.1])
    count = 4000
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (count, 1))
    rows = [options(1.0, 0, 1.0, seed) for seed in range(count)]
    tokens = sample(logits, rows, np.full(count, 7))[:, 0]
    share = np.bincount(tokens, minlength=4) / count
    np.testing.assert_allclose(share, probs, atol=0.03)


@pytest.mark.parametrize("along", ["seeds", "positions", "ids"])
def test_noise_is_gumbel_whatever_is_counted(along):
    count = 40_000
    seeds, positions, ids = (
        np.zeros(1, np.uint32),
        np.zeros(1, np.int32),
        np.zeros((1, 1), np.int32),
    )
    counted = np.arange(count)
    if along == "seeds":
        seeds, positions = counted.astype(np.uint32), np.zeros(count, np.int32)
    if along == "positions":
        seeds, positions = np.zeros(count, np.uint32), counted.astype(np.int32)
    if along == "ids":
        ids = counted[None].astype(np.int32)
    drawn = np.asarray(sampling.noise(seeds, positions, ids)).ravel()
    ranked = np.exp(-np.exp(-np.sort(drawn)))  # Uniform if it is Gumbel noise.
    distance = np.abs(ranked - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / np.sqrt(count)  # Kolmogorov-Smirnov at 0.1%
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(count)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 5, 63, 64, 65, 150]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    scale=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_a_draw_is_one_that_is_kept_and_the_same_beside_others(seed, top_k, top_p, min_p, scale):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(3, 200)) * scale).astype(np.float32).round(2)
    asked = options(1.0, top_k, top_p, seed, min_p)
    # One neighbor is settled among the best tokens, one needs the whole vocabulary.
    packed = sample(logits, [asked, options(1.0, 1, 1.0, 1), options(1.0, 0, 1.0, 2)], [3, 4, 5])
    kept = kept_by_sorting(logits[0], min(top_k, 200), top_p)
    kept &= np.exp(logits[0] - logits[0].max()) >= min_p * (1 - 1e-6)
    token = packed[0, 0]
    # What lies within rounding of a threshold may go either way.
    near = np.abs(logits[0] - logits[0][kept].min()) < 1e-4
    assert kept[token] or near[token]
    settled = sample(logits[:2], [asked, options(1.0, 1, 1.0, 1)], [3, 4])
    assert settled[0, 0] == token


def test_a_draw_depends_on_seed_and_position_alone():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    alone = sample(logits[1:2], [options(0.9, 0, 0.95, 11)], [5])[0, 0]
    rows = [options(1.3, 5, 1.0, 2), options(0.9, 0, 0.95, 11), options(0.0, 0, 1.0, 3)]
    together = sample(logits, rows, [9, 5, 1])[:, 0]
    assert together[1] == alone
    assert together[2] == int(jnp.argmax(logits[2]))
    draws = {int(sample(logits[1:2], [options(2.0, 0, 1.0, 11)], [p])[0, 0]) for p in range(20)}
    assert len(draws) > 5


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_flags_rows_that_are_not_finite(poison):
    logits = jnp.zeros((2, 6)).at[1, 3].set(poison)
    meta = jnp.array([[0, 1, 0, 0], [0, 1, 0, 1]], jnp.int32)
    _, packed = sampling.greedy(logits, logits, jnp.zeros(2, jnp.int32), meta)
    assert np.asarray(packed)[:, 2].tolist() == [1, 0]


def test_log_probability_is_of_the_unmodified_logits():
    logits = jax.random.normal(jax.random.key(1), (1, 20))
    packed = sample(logits, [options(0.5, 3, 0.9, 4)], [0])
    wanted = jax.nn.log_softmax(logits)[0, packed[0, 0]]
    np.testing.assert_allclose(packed[:, 1].view(np.float32)[0], wanted, atol=1e-6)


def test_padding_rows_leave_other_sequences_alone():
    meta = jnp.array([[0, 1, 0, 2], [0, 0, 0, 0]], jnp.int32)
    logits = jnp.eye(2, 5)
    last, _ = sampling.greedy(logits, logits, jnp.array([7, 8, 9], jnp.int32), meta)
    assert np.asarray(last).tolist() == [7, 8, 0]
