"""Sampling options through the whole engine: whatever else is in the batch, however often it gives way."""

import dataclasses
import math

import numpy as np
import pytest
from harness import Agent, oracle, request

from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.zoo.store import Zoo

BASE, ADAPTER = "llama_gqa_untied", "lora_all_r8"
CONFIG = EngineConfig(
    max_num_seqs=16,
    max_model_len=160,
    page_size=16,
    decode_sizes=(16,),
    prefill_grids=((16, 16),),
    kv_memory_mb=1,
)
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
OPTIONS = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "seed": 6, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    PENALTIES,
    {"temperature": 0.8, "seed": 7, **PENALTIES},
    {"logit_bias": ((5, 4.0), (9, -100.0)), "temperature": 1.0, "seed": 2**32 + 8},
    {"min_tokens": 30, "ignore_eos": False, "temperature": 1.5, "seed": 9},
    {"top_logprobs": 5, "logprobs": True},
]


@pytest.fixture(scope="module")
def agent(zoo) -> Agent:
    return Agent.make(zoo, [BASE, ADAPTER], CONFIG)


def prompt(i: int) -> np.ndarray:
    """Prompts with nothing in common, so that none finds another's pages."""
    return oracle(BASE)["prompt"][i : i + 30]


def test_tokens_are_the_same_alone_together_and_when_giving_way(zoo, agent):
    requests = [
        request(f"r{i}", model, prompt(i), **{"max_tokens": 45, **options})
        for i, options in enumerate(OPTIONS)
        for model in (BASE if i % 2 else ADAPTER,)
    ]

    def tokens(agent, wanted):
        for one in wanted:
            agent.loop.submit(one)
        return {i: [t for o in out for t in o.token_ids] for i, out in agent.run().items()}

    alone = {}
    for one in requests:
        alone |= tokens(agent, [one])
    fresh = Agent.make(zoo, [BASE, ADAPTER], CONFIG)
    assert tokens(fresh, requests[::-1]) == alone
    tight = Agent.make(zoo, [BASE, ADAPTER], dataclasses.replace(CONFIG, kv_pages=13))
    assert tokens(tight, requests) == alone
    assert tight.loop.stats().preemptions > 0


@pytest.mark.parametrize("options", [*OPTIONS, {"prompt_logprobs": True}])
@pytest.mark.parametrize("had", [1, 2, 17, 44])
def test_a_request_goes_on_after_what_another_engine_generated(agent, options, had):
    one = request("r", BASE, prompt(3), **{"max_tokens": 45, "logprobs": True, **options})
    agent.loop.submit(one)
    whole = [o for o in agent.run()["r"] if o.token_ids]
    tokens = tuple(t for o in whole for t in o.token_ids)
    assert len(tokens) == 45
    agent.loop.submit(dataclasses.replace(one, generated=tokens[:had]))
    rest = agent.run()["r"]
    assert tuple(t for o in rest for t in o.token_ids) == tokens[had:]
    assert rest[-1].finish_reason == "length" and not any(o.prompt_logprobs for o in rest)
    np.testing.assert_allclose(
        [p for o in rest for p in o.logprobs],
        [p for o in whole[had:] for p in o.logprobs],
        atol=1e-4,
    )


def test_a_request_that_had_all_its_tokens_ends_at_once(agent):
    one = request("r", BASE, prompt(3), max_tokens=3)
    agent.loop.submit(dataclasses.replace(one, generated=(4, 5, 6)))
    (output,) = agent.run()["r"]
    assert (output.finish_reason, output.token_ids) == ("length", ())


def test_generated_ids_are_checked_as_those_of_a_prompt(agent):
    agent.loop.submit(dataclasses.replace(request("r", BASE, prompt(3)), generated=(4, 999)))
    (output,) = agent.run()["r"]
    assert "generated has 999" in output.error_message


def generated(agent, **options) -> list[int]:
    return agent.generate({"r": (BASE, prompt(0))}, **{"max_tokens": 30, **options})["r"]


def test_each_option_shows(agent):
    plain = generated(agent)
    assert generated(agent, min_p=1.0, temperature=2.0) == plain
    assert generated(agent, temperature=1e-40, seed=1) == plain  # Not the first of many infinities.
    # Numbers at the ends of their ranges pick no other token than they should.
    assert generated(agent, temperature=1.0, seed=1, top_p=1e-46) == plain
    assert len(set(generated(agent, temperature=1e30, seed=1))) > 20
    for penalty in (1e-6, 1e6):
        assert set(generated(agent, temperature=1.0, seed=1, repetition_penalty=penalty)) != {0}
    assert generated(agent, logit_bias=((plain[0], -100.0),))[0] != plain[0]
    assert generated(agent, logit_bias=((7, 100.0),)) == [7] * 30
    varied = generated(agent, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=5.0)
    assert len(set(varied)) > len(set(plain))
    assert len(set(varied)) == len(varied)
    seeded = [generated(agent, temperature=1.0, seed=s) for s in (3, 3 + 2**32, 4)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_min_tokens_hold_off_every_end(agent):
    ends = tuple(dict.fromkeys(generated(agent)))[:3]
    assert len(generated(agent, stop_token_ids=ends)) == 0
    for wanted in (1, 12):
        tokens = generated(agent, stop_token_ids=ends, min_tokens=wanted)
        assert len(tokens) >= wanted and not set(tokens) & set(ends)
    biased = {"logit_bias": ((ends[0], 100.0),), "stop_token_ids": ends}
    assert len(generated(agent, min_tokens=9, **biased)) == 9


def test_log_probabilities_of_the_best_and_of_the_prompt(agent):
    """Scored on the same tokens, once as generated and once as a prompt."""
    agent.loop.submit(request("g", BASE, prompt(0), logprobs=True, top_logprobs=3, **PENALTIES))
    outputs = agent.run()["g"]
    tokens = [t for o in outputs for t in o.token_ids]
    logprobs = [p for o in outputs for p in o.logprobs]
    best = [b for o in outputs for b in o.top_logprobs]
    assert len(best) == len(tokens)
    for token, logprob, top in zip(tokens, logprobs, best, strict=True):
        assert len(top) == 3 and sorted(top, key=lambda t: -t[1]) == list(top)
        assert dict(top).get(token, logprob) == pytest.approx(logprob, abs=1e-6)
        assert logprob <= top[0][1] + 1e-6

    known = [*prompt(0).tolist(), *tokens]
    agent.generate({"warm": (BASE, known)}, max_tokens=1)
    before = agent.loop.stats().cached_tokens
    agent.loop.submit(request("p", BASE, known, max_tokens=3, prompt_logprobs=True))
    agent.loop.submit(request("other", BASE, prompt(40), max_tokens=3))
    outputs = agent.run()
    assert agent.loop.stats().cached_tokens == before  # No position was skipped.
    scored = outputs["p"][0].prompt_logprobs
    assert len(scored) == len(known) - 1
    np.testing.assert_allclose(scored[29:], logprobs, atol=2e-5)
    assert all(not o.prompt_logprobs for o in (*outputs["p"][1:], *outputs["other"]))
    # A prompt of one token has nothing to score, and a stop at once still brings the scores.
    agent.loop.submit(request("one", BASE, [5], max_tokens=1, prompt_logprobs=True))
    assert agent.run()["one"][0].prompt_logprobs == ()
    stop = generated(agent)[0]
    stops = {"stop_token_ids": (stop,), "prompt_logprobs": True}
    agent.loop.submit(request("s", BASE, prompt(0), **stops))
    (only,) = agent.run()["s"]
    assert only.finish_reason == "stop" and len(only.prompt_logprobs) == 29


def test_prompt_logprobs_are_those_of_transformers(agent):
    expected = oracle(BASE)
    agent.loop.submit(request("p", BASE, expected["prompt"], max_tokens=1, prompt_logprobs=True))
    output = agent.run()["p"][0]
    scored = output.prompt_logprobs
    logits = expected["logits"][:-1].astype(np.float64)
    chosen = logits[np.arange(79), expected["prompt"][1:]]
    total = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(scored, chosen - total, atol=2e-4)
    # The best token at each place comes from the same logits: where it is the prompt's own, the values
    # are equal.
    ((ids, best),) = (zip(*(top[0] for top in output.prompt_top_logprobs), strict=True),)
    np.testing.assert_allclose(best, logits.max(axis=1) - total, atol=2e-4)
    gaps = np.diff(np.partition(logits, -2)[:, -2:])[:, 0]
    clear = gaps > 1e-3
    assert clear.sum() > 70
    assert (np.array(ids)[clear] == logits.argmax(axis=1)[clear]).all()
    for token, value, other, score in zip(expected["prompt"][1:], best, ids, scored, strict=True):
        assert (value == score) if token == other else (value >= score)


def test_samples_of_one_prompt_share_its_pages(zoo):
    agent = Agent.make(zoo, [BASE], CONFIG)
    prompt = oracle(BASE)["prompt"][:70]
    for i in range(6):
        options = {"temperature": 1.0, "seed": i, "max_tokens": 10}
        agent.loop.submit(request(f"r{i}", BASE, prompt, **options))
    outputs = agent.run()
    assert len({tuple(t for o in out for t in o.token_ids) for out in outputs.values()}) > 1
    stats = agent.loop.stats()
    assert stats.cached_tokens == 5 * 64 and stats.prompt_tokens == 70 + 5 * 6
    assert stats.pages_free == stats.pages_total


def test_who_waits_for_a_prefix_goes_on_when_its_owner_ends(zoo):
    agent = Agent.make(zoo, [BASE], CONFIG)
    prompt = oracle(BASE)["prompt"][:70]
    for i in range(3):
        agent.loop.submit(request(f"r{i}", BASE, prompt, max_tokens=5))
    agent.loop.step()
    assert (agent.loop.stats().running, agent.loop.stats().waiting) == (1, 2)
    agent.loop.cancel("r0")
    outputs = agent.run()
    assert [outputs[f"r{i}"][-1].finish_reason for i in (1, 2)] == ["length"] * 2
    assert not agent.loop.kv._computing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give more than 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"temperature": 1e39}, "temperature is 1e+39; give 0 to 1e+30"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; give more than 0"),
        (
            {"logit_bias": ((5, 1e39),)},
            "logit_bias has 1e+39 for the id 5; give values of -100 to 100",
        ),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_logprobs": 21}, "top_logprobs is 21; give 0 to 20"),
        ({"logit_bias": ((5, 1.0),) * 65}, "logit_bias has 65 ids; give at most 64"),
        ({"logit_bias": ((128, 1.0),)}, "ids from 0 to 127"),
        ({"min_tokens": 1, "stop_token_ids": (5,) * 81}, "give at most 80"),
    ],
)
def test_refuses_what_no_program_holds(agent, options, words):
    agent.loop.submit(request("r", BASE, [5], **options))
    (output,) = agent.run()["r"]
    assert output.error_code == "INVALID_ARGUMENT" and words in output.error_message


def test_no_option_compiles_while_a_request_waits(zoo, tmp_path):
    config = dataclasses.replace(CONFIG, decode_sizes=(1, 4), prefill_grids=((1, 16), (4, 16)))
    store = Zoo.open(zoo)
    engine = ThreadEngine(store, {BASE: store.chain(BASE)}, config, ExecutableCache(tmp_path))
    try:
        engine.models()  # Warm: the first tier is there, the rest comes behind these requests.
        for i, options in enumerate([*OPTIONS, {"prompt_logprobs": True}]):
            engine.submit(request(f"r{i}", BASE, prompt(i), **{"max_tokens": 20, **options}))
        left = len(OPTIONS) + 1
        while left:
            left -= sum(o.finish_reason == "length" for o in engine.poll(10))
        assert engine.stats().compiles_on_serving_path == 0
    finally:
        engine.close()
