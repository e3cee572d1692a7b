"""Steps that end in time: what is held goes on, nobody waits for ever, and what was held can leave."""

import dataclasses

import pytest
from harness import Agent, oracle, request

from jblock.engine.config import EngineConfig
from jblock.engine.scheduling.step_budget import NO_LIMIT

MODELS = ["llama_gqa_untied", "mistral_window"]
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_model_len=128,
    page_size=16,
    decode_sizes=(1, 8),
    prefill_grids=((4, 16),),
    kv_memory_mb=2,
    step_ms=10,
)


@pytest.fixture
def agent(zoo) -> Agent:
    """A device on which a layer seems to take about a second."""
    agent = Agent.make(zoo, MODELS, CONFIG)
    agent.slow_down(1e4)
    return agent


def prompt(model: str, length: int) -> tuple[int, ...]:
    return tuple(oracle(model)["prompt"][:length].tolist())


def decode_until(agent: Agent, wanted: set[str]) -> None:
    """Steps until each of these requests has brought a token."""
    while wanted:
        wanted = wanted - {o.request_id for o in agent.loop.step() if o.token_ids}


def test_a_long_prompt_never_holds_up_a_stream_by_more_than_a_layer_a_step(agent):
    agent.loop.submit(request("stream", MODELS[0], prompt(MODELS[0], 4), max_tokens=100))
    decode_until(agent, {"stream"})
    agent.loop.submit(request("long", MODELS[1], prompt(MODELS[1], 48), max_tokens=2))
    counts, came = [], False
    while not came:
        before = agent.loop.stats().steps
        outputs = agent.loop.step()
        came = any(o.request_id == "long" for o in outputs)
        counts.append(sum(o.request_id == "stream" for o in outputs))
        assert agent.loop.stats().steps == before + 1
    # A token in every step, for many more steps than the three chunks: they stay between layers.
    assert all(counts[1:])
    units = sum(len(i.layers) for i in agent.graph.routes[MODELS[1]].instances)
    assert 3 * (units - 2) <= len(counts) <= 3 * units + 3


@pytest.mark.parametrize("step_ms, prompts", [(10, 4), (2000, 8)])
def test_a_step_that_may_take_longer_reads_more_prompts(zoo, step_ms, prompts):
    agent = Agent.make(zoo, MODELS, dataclasses.replace(CONFIG, step_ms=step_ms))
    for i in range(8):
        agent.loop.submit(request(str(i), MODELS[0], prompt(MODELS[0], 16), max_tokens=2))
    agent.loop.step()
    assert agent.loop.stats().prompt_tokens == prompts * 16


def test_a_long_prompt_leaves_later_short_ones_their_share(agent):
    """While answers stream, prompts in flight are given equal time, so a short one ends long before a
    long one that came first."""
    agent.loop.submit(request("stream", MODELS[0], prompt(MODELS[0], 4), max_tokens=110))
    decode_until(agent, {"stream"})
    agent.loop.submit(request("long", MODELS[0], prompt(MODELS[0], 100), max_tokens=1))
    agent.loop.step()
    for i in range(2):
        agent.loop.submit(request(f"short{i}", MODELS[1], prompt(MODELS[1], 16 + i), max_tokens=1))
    ended: list[str] = []
    while len(ended) < 3:
        ended += [o.request_id for o in agent.loop.step() if o.request_id != "stream"]
    assert ended[-1] == "long"


def test_prompts_of_one_length_end_in_the_order_they_came(agent):
    agent.loop.submit(request("stream", MODELS[0], prompt(MODELS[0], 4), max_tokens=110))
    decode_until(agent, {"stream"})
    first: list[str] = []
    for i in range(5):
        model = MODELS[0]
        agent.loop.submit(request(f"p{i}", model, prompt(model, 30 + i)[i:], max_tokens=1))
    while len(first) < 5:
        first += [o.request_id for o in agent.loop.step() if o.request_id != "stream"]
    # Prompts of one chain and length may share a call, so neighbors may come together.
    assert first == sorted(first)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_who_leaves_half_way_gives_everything_back(agent, steps):
    free = agent.loop.stats().pages_free, agent.loop.stats().rows_free
    agent.loop.submit(request("stream", MODELS[0], prompt(MODELS[0], 4), max_tokens=20))
    decode_until(agent, {"stream"})
    for name in ("a", "b"):
        agent.loop.submit(request(name, MODELS[1], prompt(MODELS[1], 16), max_tokens=4))
    for _ in range(steps):
        agent.loop.step()
    agent.loop.cancel("a")
    outputs = agent.run()
    assert sum(len(o.token_ids) for o in outputs["b"]) == 4
    assert (agent.loop.stats().pages_free, agent.loop.stats().rows_free) == free
    assert all(queue.empty for _, queue in agent.loop._stepper.queues)


def test_rows_over_the_limit_go_first_in_the_next_step(agent):
    """Eight streams, a limit of one: each gets a token in every eighth step."""
    for i in range(8):
        agent.loop.submit(request(f"s{i}", MODELS[0], prompt(MODELS[0], 4 + i), max_tokens=60))
    decode_until(agent, {f"s{i}" for i in range(8)})
    block = next(i for i in agent.graph.routes[MODELS[0]].instances if len(i.layers) > 1)
    times = agent.loop.profile._seconds
    for name in times:  # Every row costs.
        if name.startswith("layer") and "x1-" in name:
            times[name] = float(name.rsplit("_", 1)[1].split("x")[0])
    agent.loop.profile.forget()
    last = {f"s{i}": agent.loop.stats().steps for i in range(8)}
    gaps = []
    for _ in range(60):
        for output in agent.loop.step():
            step = agent.loop.stats().steps
            gaps.append(step - last[output.request_id])
            last[output.request_id] = step
    assert agent.loop._stepper.queues[block].limit == 1
    assert max(gaps) <= 8 + 1
    agent.run()


def test_without_streams_a_prompt_takes_the_step_it_needs(agent):
    agent.loop.submit(request("alone", MODELS[0], prompt(MODELS[0], 16), max_tokens=1))
    agent.run()
    assert agent.loop.stats().steps == 1
    assert all(queue.limit == NO_LIMIT for _, queue in agent.loop._stepper.queues)
