"""The workload generator: what it promises, over generated settings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import workload
from bench.workload import AZURE_2023, Lengths, generate

LENGTHS = Lengths(prompt=(3, 17), output=(2, 9))
MODELS = [f"m{i}" for i in range(12)]


def make(**changes):
    options = {
        "models": MODELS,
        "count": 200,
        "lengths": LENGTHS,
        "vocab_size": 100,
        "seed": 1,
        **changes,
    }
    return generate(**options)


@given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([0.0, 0.5, 20.0]), cv=st.floats(0, 4))
@settings(max_examples=25, deadline=None)
def test_arrivals_are_ordered_within_bounds_and_repeat_with_their_seed(seed, rate, cv):
    arrivals = make(seed=seed, rate=rate, cv=cv, count=50)
    assert arrivals == make(seed=seed, rate=rate, cv=cv, count=50)
    times = [a.time for a in arrivals]
    assert times == sorted(times)
    assert all(t >= 0 for t in times)
    for arrival in arrivals:
        assert 3 <= len(arrival.prompt) <= 17
        assert 2 <= arrival.max_tokens <= 9
        assert all(0 <= t < 100 for t in arrival.prompt)
        assert arrival.model in MODELS


def test_another_seed_is_another_workload():
    assert make(seed=1) != make(seed=2)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv):
    times = workload.gamma_arrivals(np.random.default_rng(0), 40_000, 8.0, cv)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.1)


@given(count=st.integers(1, 300), exponent=st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_zipf_falls_and_sums_to_one(count, exponent):
    shares = workload.zipf(count, exponent)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 1e-12).all()


@given(count=st.integers(1, 300), alpha=st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_power_law_falls_and_sums_to_one(count, alpha):
    shares = workload.power_law(count, alpha)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 1e-12).all()


def test_popularities_have_the_shares_of_their_formulas():
    assert workload.zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert workload.power_law(4, 1.0) == pytest.approx([0.25] * 4)
    assert workload.power_law(4, 0.5)[0] == pytest.approx(0.5)
    assert workload.uniform(4) == pytest.approx([0.25] * 4)


def test_realised_shares_follow_the_popularity():
    arrivals = make(count=20_000, popularity=workload.zipf(12, 0.9))
    said = workload.describe(arrivals)
    assert said["top1_share"] == pytest.approx(workload.zipf(12, 0.9)[0], abs=0.02)
    assert said["top10_share"] == pytest.approx(workload.zipf(12, 0.9)[:10].sum(), abs=0.02)
    assert said["models"] == 12


def test_without_popularity_models_take_turns():
    arrivals = make(count=24)
    assert [a.model for a in arrivals] == MODELS * 2
    assert workload.top_share(arrivals, 1) == pytest.approx(1 / 12)
    assert workload.top_share(arrivals, 100) == 1


@pytest.mark.parametrize("trace", sorted(AZURE_2023))
def test_trace_lengths_have_the_quantiles_of_the_trace(trace):
    wide = Lengths(prompt=(1, 20_000), output=(1, 20_000), trace=trace)
    drawn = wide.draw(np.random.default_rng(0), 40_000)
    for values, table in zip(drawn, AZURE_2023[trace], strict=True):
        for percent, length in zip(workload.QUANTILES[2:8], table[2:8], strict=True):
            assert np.percentile(values, percent) == pytest.approx(length, rel=0.12, abs=2)


def test_trace_lengths_scale_and_stay_within_bounds():
    lengths = Lengths(prompt=(8, 512), output=(4, 64), trace="code", scale=0.1)
    prompts, outputs = lengths.draw(np.random.default_rng(0), 5000)
    assert np.median(prompts) == pytest.approx(147, rel=0.1)
    assert (prompts.min(), prompts.max()) == (8, 512)
    assert outputs.min() == 4
    assert outputs.max() == 64


@pytest.mark.parametrize(("share", "private"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 2), (1.0, 0)])
def test_share_of_common_blocks(share, private):
    assert workload.private_layers(16, share) == private


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lengths(prompt=(0, 4), output=(1, 2)), "least"),
        (lambda: Lengths(prompt=(4, 3), output=(1, 2)), "least"),
        (lambda: Lengths(prompt=(1, 3), output=(1, 2), trace="gone"), "known: conversation, code"),
        (lambda: workload.power_law(3, 0.0), "alpha"),
        (lambda: workload.gamma_arrivals(np.random.default_rng(0), 3, 0.0, 1.0), "positive rate"),
        (lambda: workload.private_layers(4, 1.5), "common_share"),
        (lambda: workload.top_share([], 1), "no arrivals"),
    ],
)
def test_nonsense_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
