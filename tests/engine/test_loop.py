"""The loop's rules: admission, refusals, endings, and what it gives back."""

import pytest
from harness import SMALL, Agent, oracle, request

from jblock.engine.config import EngineConfig

MODEL = "llama_gqa_untied"


@pytest.fixture(scope="module")
def agent(zoo) -> Agent:
    return Agent.make(zoo, [MODEL], SMALL)


@pytest.fixture(autouse=True)
def everything_comes_back(agent):
    yield
    stats = agent.loop.stats()
    assert stats.pages_free == stats.pages_total and stats.rows_free == stats.rows_total
    assert agent.loop.idle


@pytest.mark.parametrize(
    ("model", "prompt", "options", "code", "words"),
    [
        ("nobody", [5], {}, "NOT_FOUND", "'nobody' is not served; served: " + MODEL),
        (MODEL, [], {}, "INVALID_ARGUMENT", "token_ids is empty"),
        (MODEL, [5] * 64, {}, "INVALID_ARGUMENT", "64 tokens"),
        (MODEL, [5, 128], {}, "INVALID_ARGUMENT", "0 to 127"),
        (MODEL, [5, -1], {}, "INVALID_ARGUMENT", "-1"),
        (MODEL, [5], {"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens is 0"),
    ],
)
def test_refuses_what_it_cannot_serve(agent, model, prompt, options, code, words):
    agent.loop.submit(request("r", model, prompt, **options))
    (output,) = agent.run()["r"]
    assert output.finish_reason == "error" and output.error_code == code
    assert words in output.error_message


def test_ends_at_a_stop_id_without_returning_it(agent):
    prompt = oracle(MODEL)["prompt"][:40]
    free = agent.generate({"r": (MODEL, prompt)}, max_tokens=20)["r"]
    stop, before = free[5], free.index(free[5])
    agent.loop.submit(request("r", MODEL, prompt, max_tokens=20, stop_token_ids=(stop,)))
    outputs = agent.run()["r"]
    assert [t for o in outputs for t in o.token_ids] == free[:before]
    assert outputs[-1].finish_reason == "stop"


def test_a_prompt_near_the_limit_generates_what_fits(agent):
    agent.loop.submit(request("r", MODEL, [7] * 63, max_tokens=50))
    outputs = agent.run()["r"]
    assert sum(len(o.token_ids) for o in outputs) == 1
    assert outputs[-1].finish_reason == "length"


def test_more_requests_than_fit_wait_their_turn(agent):
    prompt = oracle(MODEL)["prompt"][:20]
    alone = agent.generate({"r": (MODEL, prompt)}, max_tokens=12)["r"]
    out = agent.generate({f"r{i}": (MODEL, prompt) for i in range(11)}, max_tokens=12)
    assert len(out) == 11 and all(tokens == alone for tokens in out.values())


def test_cancelling_waiting_and_running_requests_frees_them(agent):
    prompt = oracle(MODEL)["prompt"][:20]
    for i in range(9):
        agent.loop.submit(request(f"r{i}", MODEL, prompt, max_tokens=30))
    agent.loop.step()
    for i in (0, 3, 8):
        agent.loop.cancel(f"r{i}")
    agent.loop.cancel("unknown")
    outputs = agent.run()
    for i in range(9):
        reason = outputs[f"r{i}"][-1].finish_reason
        assert reason == ("cancelled" if i in (0, 3, 8) else "length")


def test_a_cache_too_small_for_one_sequence_is_refused(zoo):
    with pytest.raises(ValueError, match="kv_memory_mb"):
        Agent.make(zoo, [MODEL], EngineConfig(max_model_len=100_000, kv_memory_mb=1))


def test_an_id_in_use_is_refused_whether_its_request_runs_or_waits(agent):
    prompt = oracle(MODEL)["prompt"][:20]
    for i in range(6):  # two more than run at a time
        agent.loop.submit(request(f"r{i}", MODEL, prompt, max_tokens=4))
    agent.loop.step()
    for i in (0, 5):
        agent.loop.submit(request(f"r{i}", MODEL, prompt, max_tokens=4))
    refused = [o.request_id for o in agent.loop._outputs if "already in flight" in o.error_message]
    assert refused == ["r0", "r5"]
    agent.run()
