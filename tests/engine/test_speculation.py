"""Drafted tokens change nothing but when tokens come: random drafts, loads, cancels and preemptions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SMALL, Agent, oracle, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from jblock.engine.programs import sampling
from jblock.engine.scheduling.step_budget import Times
from jblock.engine.speculation import speculation
from jblock.engine.speculation.lengths import Acceptance, Proposal, StepTime, choose, least_rate
from jblock.engine.speculation.ngrams import LONGEST, Match, NgramIndex

MODELS = ["llama_gqa_untied", "lora_qv_r4"]
MORE = dataclasses.replace(SMALL, decode_sizes=(16,), max_num_seqs=16, kv_memory_mb=4)
OPTIONS = {
    "greedy": {"logprobs": True},
    "seeded": {"temperature": 1.0, "seed": 7, "top_k": 9, "top_p": 0.9, "logprobs": True},
    "biased": {"temperature": 0.7, "seed": 3, "logit_bias": ((5, 3.0),), "min_tokens": 9},
    "stopped": {"ignore_eos": False, "stop_token_ids": tuple(range(0, 200, 11)), "min_tokens": 3},
    "top": {"top_logprobs": 3, "logprobs": True},
    "said": {"logit_bias": ((9, 99.0),)},
    "penalized": {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
}


@pytest.fixture(scope="module")
def agent(zoo) -> Agent:
    """Four rows a call: the rows of a sequence may lie in two."""
    return measured(zoo, SMALL)


@pytest.fixture(scope="module")
def few_pages(zoo) -> Agent:
    """Not enough pages for all that may come."""
    return measured(zoo, dataclasses.replace(SMALL, kv_pages=9))


@pytest.fixture(scope="module")
def large(zoo) -> Agent:
    """Sixteen rows a call."""
    return measured(zoo, MORE)


def measured(zoo, config) -> Agent:
    """An agent for which each block takes as long as FLAT says."""
    made = Agent.make(zoo, MODELS, config)
    made.slow_down(1)
    times = lambda instance: dataclasses.replace(FLAT)
    made.loop.profile.decode_times = times  # type: ignore[method-assign]
    return made


def transcript(outputs) -> list:
    """What came of a request, whatever step it came in."""
    return [
        [t for o in outputs for t in o.token_ids],
        [x for o in outputs for x in o.logprobs],
        [x for o in outputs for x in o.top_logprobs],
        outputs[-1].finish_reason,
    ]


def prompt_of(model: str, length: int) -> tuple[int, ...]:
    ids = oracle(model)["prompt"]
    return tuple(int(t) for t in np.resize(ids, length))


class Alone:
    """What a request brings when nothing is drafted and nobody else is there; remembered."""

    def __init__(self, agent: Agent):
        self.agent, self.known = agent, {}

    def __call__(self, model: str, length: int, option: str, max_tokens: int) -> list:
        key = (model, length, option, max_tokens)
        if key not in self.known:
            loop = self.agent.loop
            held, loop._speculation = loop._speculation, None
            options = {**OPTIONS[option], "max_tokens": max_tokens}
            loop.submit(request("alone", model, prompt_of(model, length), **options))
            self.known[key] = transcript(self.agent.run()["alone"])
            loop._speculation = held
        return self.known[key]


@pytest.fixture(scope="module")
def alone(agent) -> Alone:
    return Alone(agent)


class Oracle:
    """Drafts that come true for a while, of what is known to come; then noise."""

    def __init__(self, monkeypatch, seed: int):
        self.rng = np.random.default_rng(seed)
        self.coming: dict[str, list[int]] = {}
        monkeypatch.setattr(speculation.Drafter, "look", lambda own, s, most: self.look(s, most))
        monkeypatch.setattr(speculation, "choose", self.choose)
        monkeypatch.setattr(speculation, "least_rate", lambda *_: 0.0)

    def look(self, sequence, most):
        if sequence.sampled > len(sequence.generated) + 1 or self.rng.random() < 0.2:
            return None
        done = len(sequence.generated)
        true = self.coming[sequence.request.request_id][done : done + self.rng.integers(0, 9)]
        noise = self.rng.integers(0, 64, 8).tolist()
        tokens = (*true, *noise)[: int(self.rng.integers(1, most + 1))]
        return Match(2, tuple(int(t) for t in tokens)), Acceptance(0.5)

    def choose(self, drafts, step, tokens, room, budget):
        lengths = []
        for draft in drafts:
            lengths.append(int(min(self.rng.integers(0, draft.most + 1), room)))
            room -= lengths[-1]
        return lengths


def hold_but_for_rounding(got: list, wanted: list) -> None:
    """What was preempted is computed anew as a prompt, in products of more rows: on some processors by other
    instructions, which round otherwise: XLA's own products do too, on one with AVX-512 and AMX."""
    assert (got[0], got[3]) == (wanted[0], wanted[3])
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-5)
    assert [set(dict(x)) for x in got[2]] == [set(dict(x)) for x in wanted[2]]
    for x, y in zip(got[2], wanted[2], strict=True):
        for token, value in dict(x).items():
            assert value == pytest.approx(dict(y)[token], abs=1e-5)


def check(agent: Agent, alone: Alone, monkeypatch, jobs, cancels, seed: int) -> None:
    """Runs jobs of (model, prompt length, option, tokens, step it comes in) together; what each brings is
    what it brings alone."""
    oracle_ = Oracle(monkeypatch, seed)
    wanted = {f"r{i}": alone(*job[:4]) for i, job in enumerate(jobs)}
    oracle_.coming = {name: one[0] for name, one in wanted.items()}
    outputs: dict[str, list] = {name: [] for name in wanted}
    step, loop = 0, agent.loop
    preemptions = loop.stats().preemptions
    left = list(enumerate(jobs))
    while left or not loop.idle:
        for i, (model, length, option, tokens, _) in [x for x in left if x[1][4] <= step]:
            options = {**OPTIONS[option], "max_tokens": tokens}
            loop.submit(request(f"r{i}", model, prompt_of(model, length), **options))
        left = [x for x in left if x[1][4] > step]
        for name in [f"r{i}" for i, at in cancels if at == step]:
            loop.cancel(name)
        for output in loop.step():
            outputs[output.request_id].append(output)
        step += 1
    cancelled = {f"r{i}" for i, _ in cancels}
    for name, one in outputs.items():
        got = transcript(one)
        if got[3] == "cancelled":
            assert name in cancelled
            assert got[0] == wanted[name][0][: len(got[0])]
        elif loop.stats().preemptions > preemptions:
            hold_but_for_rounding(got, wanted[name])
        else:
            assert got == wanted[name], name
    after = loop.stats()
    assert after.pages_free == after.pages_total and after.rows_free == after.rows_total


def test_every_option_brings_what_it_brings_without(agent, alone, monkeypatch):
    before = agent.loop.stats()
    jobs = [(MODELS[i % 2], 5 + i, option, 24, i) for i, option in enumerate(OPTIONS)]
    check(agent, alone, monkeypatch, jobs, [(0, 9)], 1)
    after = agent.loop.stats()
    drafted = after.drafted_tokens - before.drafted_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    assert drafted > accepted > 10


JOBS = st.lists(
    st.tuples(
        st.sampled_from(MODELS),
        st.sampled_from([2, 15, 16, 17, 30]),
        st.sampled_from(sorted(OPTIONS)),
        st.sampled_from([1, 2, 9, 33]),
        st.integers(0, 12),
    ),
    min_size=1,
    max_size=9,
)
CANCELS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), max_size=2)
MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["agent", "few_pages", "large"])
@MANY
@given(jobs=JOBS, cancels=CANCELS, seed=st.integers(0, 9999))
def test_random_loads_bring_the_same(request, kind, jobs, cancels, seed):
    agent = request.getfixturevalue(kind)
    with pytest.MonkeyPatch.context() as patch:
        check(agent, request.getfixturevalue(f"alone_{kind}"), patch, jobs, cancels, seed)


@pytest.fixture(scope="module")
def alone_agent(alone) -> Alone:
    return alone


@pytest.fixture(scope="module")
def alone_few_pages(few_pages) -> Alone:
    return Alone(few_pages)


@pytest.fixture(scope="module")
def alone_large(large) -> Alone:
    return Alone(large)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_of_verified_rows_follow_the_distribution(settings):
    """200,000 draws, of the rows of a run and of others beside it, against probabilities by sorting."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    vocab, rows, calls = 40, 16, 12_500
    rng = np.random.default_rng(0)
    logits = jnp.tile(jnp.asarray(rng.standard_normal(vocab) * 2, jnp.float32), (rows, 1))
    array = np.zeros((rows, 5), np.int32)
    array.view(np.float32)[:, [0, 2, 4]] = [options[k] for k in ("temperature", "top_p", "min_p")]
    array[:, 1] = options["top_k"]
    # A run of nine rows of one sequence, then seven others.
    meta = np.ones((rows, 4), np.int32)
    meta[:9, 0], meta[9:, 3] = np.arange(9), np.arange(2, 9)

    def call(seed):
        own = jnp.asarray(array).at[:, 3].set(seed + jnp.where(meta[:, 3] > 1, meta[:, 3], 0))
        return sampling.sampled(logits, logits, jnp.zeros(9, jnp.int32), meta, own)[1][:, 0]

    drawn = np.asarray(jax.jit(lambda seeds: jax.lax.map(call, seeds))(jnp.arange(calls) * 16))
    found = np.bincount(drawn.reshape(-1), minlength=vocab)
    wanted = expected(np.asarray(logits[0], np.float64), **options) * drawn.size
    assert found.sum() == 200_000 and not found[wanted == 0].any()
    assert stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def expected(logits, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities by sorting."""
    order = np.argsort(-logits)
    x = logits[order] / temperature
    probs = np.exp(x - x.max())
    if top_k:
        probs[top_k:] = 0
    probs /= probs.sum()
    keep = np.cumsum(probs) - probs < top_p
    probs = np.where(keep & (probs >= min_p * probs.max()), probs, 0)
    out = np.zeros_like(probs)
    out[order] = probs / probs.sum()
    return out


@pytest.mark.long
def test_few_pages_preempt_sequences_that_guess(few_pages, alone, monkeypatch):
    jobs = [(MODELS[0], 17, "seeded" if i % 2 else "greedy", 33, i // 2) for i in range(6)]
    check(few_pages, alone, monkeypatch, jobs, [], 2)
    assert few_pages.loop.stats().preemptions > 0


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_a_sequence_that_is_resumed_goes_on_the_same(agent, alone, monkeypatch, option):
    """As after a restart, when tokens that were delivered come with the request."""
    model, length, count = MODELS[0], 17, 24
    wanted = alone(model, length, option, count)
    oracle_, known = Oracle(monkeypatch, 1), len(wanted[0]) // 3
    oracle_.coming = {"again": wanted[0]}
    options = {**OPTIONS[option], "max_tokens": count}
    again = request("again", model, prompt_of(model, length), **options)
    before = agent.loop.stats().accepted_tokens
    agent.loop.submit(dataclasses.replace(again, generated=tuple(wanted[0][:known])))
    got = transcript(agent.run()["again"])
    assert (got[0], got[3]) == (wanted[0][known:], wanted[3])
    assert option == "stopped" or agent.loop.stats().accepted_tokens > before


def test_a_sequence_that_repeats_itself_takes_few_steps(agent, alone):
    """Drafts and their numbers as they are; a prompt that says one thing, and must say it again."""
    model, length = MODELS[0], 20
    wanted = alone(model, length, "said", 24)
    before = agent.loop.stats()
    options = {**OPTIONS["said"], "max_tokens": 24}
    agent.loop.submit(request("own", model, prompt_of(model, length), **options))
    assert transcript(agent.run()["own"]) == wanted
    after = agent.loop.stats()
    accepted = after.accepted_tokens - before.accepted_tokens
    assert accepted > 12 and after.steps - before.steps < 16


def test_the_longest_end_that_stands_elsewhere_is_followed():
    index = NgramIndex()
    assert index.draft(4) is None
    index.extend([1, 2, 3, 9, 2, 3, 7, 7, 1, 2, 3])
    assert index.draft(3) == Match(3, (9, 2, 3))  # 2, 3 stands later too, but 1, 2, 3 is longer
    index.extend([5, 6])
    assert index.draft(3) is None
    loop = NgramIndex()
    loop.extend([4, 5, 6, 4, 5])
    assert loop.draft(7) == Match(2, (6, 4, 5, 6, 4, 5, 6))
    loop.extend([6, 4, 5] * 5)
    assert loop.draft(1) == Match(LONGEST, (6,))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_what_is_drafted_followed_the_same_tokens_before(tokens, most):
    index = NgramIndex()
    for token in tokens:
        index.extend([token])
    found = index.draft(most)
    pairs = list(itertools.pairwise(tokens))
    if found is None:
        assert not pairs or pairs[-1] not in pairs[:-1]
        return
    n, end = found.length, tokens[-found.length :]
    places = [p for p in range(n, len(tokens)) if tokens[p - n : p] == end]
    wholes = [tokens[p:] + list(found.tokens) for p in places]
    assert any(tuple(w[:most]) == found.tokens for w in wholes)


FLAT = Times((1, 4, 8, 16), (1.0, 1.1, 1.3, 1.8))
STEEP = Times((1, 4, 8, 16), (1.0, 4.0, 8.0, 16.0))


@pytest.mark.parametrize(
    "times, rate, rows, wanted",
    [(FLAT, 0.9, 1, [7]), (FLAT, 0.4, 1, [3]), (FLAT, 0.01, 1, [0]), (STEEP, 0.95, 1, [0])],
)
def test_as_many_are_guessed_as_pay(times, rate, rows, wanted):
    step = StepTime()
    step.add((times,), rows)
    assert choose([Proposal((times,), rate, 8)], step, rows, 99, 99.0) == wanted


def test_the_likeliest_guesses_come_first_and_bounds_hold():
    def chosen(room=99, budget=99.0):
        step = StepTime()
        step.add((FLAT,), 2)
        drafts = [Proposal((FLAT,), 0.2, 8), Proposal((FLAT,), 0.9, 8)]
        return choose(drafts, step, 2, room, budget)

    assert chosen() == [0, 6] and chosen(room=1) == [0, 1]


def test_a_full_device_has_no_use_for_drafts():
    def least(times: Times, rows: int, pause: float = 0.0, beside: int = 0) -> float:
        step = StepTime()
        step.add((times,), rows)
        step.add((dataclasses.replace(times),), beside)
        return least_rate(step, (times,), rows, rows + beside, 8, pause)

    assert least(FLAT, 1) < 0.4 < 1 < least(FLAT, 16) and least(STEEP, 1) > 1
    assert least(FLAT, 1, pause=9.0) > 1  # reading first would cost more than it brings
    # A block of its own that has room, beside one that is full.
    assert least(FLAT, 1, beside=16) < 1


def test_the_rate_follows_what_comes_true():
    rate = Acceptance(0.5)
    for _ in range(20):
        rate.note(4, 4)
    assert rate.rate > 0.9
    for _ in range(20):
        rate.note(0, 8)
    assert rate.rate < 0.25
