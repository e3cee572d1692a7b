"""Chains in spans on several agents: the tokens are one agent's, whatever is drawn and whoever forgets."""

import dataclasses
import random
from pathlib import Path

import pytest
from harness import FIXTURES, SMALL, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from span_agents import SpanAgents, by_layers
from span_faults import Faults

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.engine.spans.messages import Closed, Gone

MODELS = ("llama_gqa_untied", "lora_all_r8")
PREFIX = tuple(5 + 7 * i % 90 for i in range(32))
CONFIG = dataclasses.replace(SMALL, host_kv_memory_mb=0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A base and an adapter on it."""
    path, quiet = tmp_path_factory.mktemp("spans") / "zoo", Progress(False)
    hf.convert(FIXTURES / "hf" / MODELS[0], path, MODELS[0], quiet)
    peft.convert(FIXTURES / "peft" / MODELS[1], path, MODELS[0], MODELS[1], quiet)
    return path


def requests(count: int = 6) -> list:
    """Of each model, greedy and drawn with a seed; some begin alike."""
    made = []
    for i in range(count):
        own = tuple(5 + (11 * j + i) % 90 for j in range(4 + 2 * i))
        drawn = {"temperature": 1.0, "seed": i} if i % 3 == 2 else {"temperature": 0.0}
        prompt = (*PREFIX, *own) if i % 4 < 2 else own
        made.append(request(f"r{i}", MODELS[i % 2], prompt, max_tokens=10, **drawn))
    return made


@pytest.fixture(scope="module")
def one(zoo) -> dict[str, list[int]]:
    """What an agent with whole chains answers."""
    agent = SpanAgents(zoo, MODELS, [CONFIG], None)
    for asked in requests():
        agent.submit(asked)
    return agent.run()


def test_two_agents_answer_as_one_and_find_prefixes(zoo, one):
    agents = SpanAgents(zoo, MODELS, [CONFIG] * 2, by_layers([0, 1]))
    for asked in requests():
        agents.submit(asked)
    assert agents.run() == one
    hits = [loop.stats().cached_tokens for loop in agents.loops]
    assert hits[0] == hits[1] >= 32
    agents.check_clean()
    # The whole prompt again, and what was generated behind it.
    again = dataclasses.replace(requests()[0], request_id="again")
    agents.submit(again)
    assert agents.run()["again"] == one["r0"]
    assert agents.loops[1].stats().cached_tokens == hits[1] + 32


def test_a_request_whose_agents_end_again_and_again_is_refused(zoo, one):
    agents = SpanAgents(zoo, MODELS, [CONFIG] * 2, by_layers([0, 1]))
    first, second = requests()[2:4]
    agents.submit(first)

    def disturb() -> None:
        running = agents.loops[0]._sequences.running.values()
        told = any(isinstance(message, Gone) for _, message, _ in agents.ports[1].sent)
        if not told and any(s.elsewhere and s.elsewhere.ready for s in running):
            agents.restart(1)

    assert agents.run(disturb=disturb) == {"r2": []}
    (last,) = agents.outputs["r2"]
    assert last.error_code == "INTERNAL" and "3 times in a row" in last.error_message
    agents.submit(second)
    assert agents.run()["r3"] == one["r3"]
    agents.check_clean()


@pytest.mark.parametrize(
    "seed,count",
    [(0, 10), *(pytest.param(s, 100, marks=pytest.mark.long) for s in range(1, 11))],
)
def test_faults_change_no_answer(zoo, one, monkeypatch, seed, count):
    """Nothing is lost, told twice, different, or stuck, whatever goes wrong with four agents and between
    them."""
    draw = random.Random(seed)
    agents = SpanAgents(zoo, MODELS, [CONFIG] * 4, by_layers([0, 1, 2, 3]))
    faults = Faults(agents, count, draw, monkeypatch)
    while faults.left:
        agents.outputs.clear()
        for asked in requests():
            agents.submit(asked)
        tokens = agents.run(draw, faults)
        ends = [o for told in agents.outputs.values() for o in told if o.finish_reason]
        assert [o.finish_reason for o in ends] == ["length"] * len(one), ends
        assert tokens == one, faults.drawn
    faults.settle()
    agents.check_clean()


def test_what_cannot_be_read_for_a_while_ends_nothing_that_has_tokens(zoo, one, monkeypatch):
    agents = SpanAgents(zoo, MODELS, [CONFIG] * 4, by_layers([0, 1, 2, 3]))
    clock, told = Faults(agents, 0, random.Random(0), monkeypatch), set()

    def disturb() -> None:
        clock()
        spans = agents.loops[0].spans
        for key, open_ in list(spans.home._open.items()):
            name = open_.sequence.request.request_id
            if len(open_.sequence.generated) == 3 and name not in told:
                told.add(name)
                spans.home.closed(Closed(key=key, code="UNAVAILABLE", message="storage is away"))

    for asked in requests():
        agents.submit(asked)
    assert agents.run(disturb=disturb) == one and told == one.keys()
    agents.check_clean()


@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_placement_any_order(zoo, one, data):
    check_drawn(zoo, one, data)


@pytest.mark.long
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_many_placements_and_orders(zoo, one, data):
    check_drawn(zoo, one, data, pages=(12, 2**31 - 1))


def check_drawn(zoo, one, data, pages=(2**31 - 1,)) -> None:
    """Spans, pages, the order of all that happens, cancels and restarts are drawn."""
    count = data.draw(st.integers(1, 4), "agents")
    layers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4), "layers")
    pages = data.draw(st.lists(st.sampled_from(pages), min_size=count, max_size=count), "pages")
    draw = random.Random(data.draw(st.integers(0, 2**32), "seed"))
    forgets = data.draw(st.integers(0, 2), "restarts") if count > 1 else 0
    configs = [dataclasses.replace(CONFIG, kv_pages=n) for n in pages]
    agents = SpanAgents(zoo, MODELS, configs, by_layers(layers))
    asked = requests()
    left = list(asked)
    cancelled = draw.choice(asked).request_id

    def disturb() -> None:
        nonlocal forgets
        if left and draw.random() < 0.2:
            agents.submit(left.pop(0))
        if draw.random() < 0.01:
            agents.loops[0].cancel(cancelled)
        if forgets and draw.random() < 0.02:
            forgets -= 1
            agents.restart(draw.randrange(1, count))

    for _ in range(3):
        agents.submit(left.pop(0))
    tokens = agents.run(draw, disturb)
    for rest in left:
        agents.submit(rest)
    tokens = agents.run(draw)
    for name, expected in one.items():
        if name == cancelled:
            assert tokens[name] == expected[: len(tokens[name])]
        else:
            assert tokens[name] == expected, name
    agents.check_clean()
