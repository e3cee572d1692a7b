"""Agents with real engines: their answers are one agent's, whoever gives them and whoever dies."""

import os
import signal
import time

import fake_devices
import pytest
from demo_agents import ADAPTER, BASE

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.scheduler.cluster import Cluster

FACTORY = "jblock.engine.factory:build_engine"
LONG = 300.0
TOKENS = 32
PREFIX = tuple(5 + 7 * i % 120 for i in range(64))


def requests() -> list[api.Request]:
    """Of each model: greedy and drawn with a seed; half begin alike, and come again later."""
    made = []
    for i in range(12):
        drawn = {"temperature": 1.0, "seed": i} if i % 3 == 2 else {}
        own = tuple(5 + (11 * j + i) % 120 for j in range(9 + i))
        made.append(
            api.Request(
                request_id=f"r{i}",
                model=(BASE, ADAPTER)[i % 2],
                token_ids=(*PREFIX, *own) if i % 4 < 2 else own,
                sampling=api.SamplingParams(max_tokens=TOKENS, ignore_eos=True, **drawn),
            )
        )
    return made


def answers(engine: api.Engine, kills: int = 0) -> dict[str, list[int]]:
    """Tokens by request, of two rounds; agents are killed in between, one after the other."""
    tokens: dict[str, list[int]] = {}
    limit = time.monotonic() + LONG
    engine.models()
    asked = requests()
    for first, last in ((0, 6), (6, 12)):
        running = {r.request_id for r in asked[first:last]}
        tokens |= {name: [] for name in running}
        for request in asked[first:last]:
            engine.submit(request)
        dead = None
        while running:
            assert time.monotonic() < limit, "not in time"
            for output in engine.poll(0.1):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == "length", output
                    running.remove(output.request_id)
            if kills and dead is None and any(len(tokens[name]) > 4 for name in running):
                dead = max(engine.agents(), key=lambda agent: agent.requests)
                os.kill(engine.pids[int(dead.name)], signal.SIGKILL)
    stats = engine.stats()
    assert stats.compiles_on_serving_path == 0 and stats.restarts == 2 * kills
    assert stats.cached_tokens > 0
    return tokens


@pytest.fixture(scope="module")
def one(kwargs) -> dict[str, list[int]]:
    """What one agent answers."""
    engine = ProcessEngine(FACTORY, kwargs)
    try:
        return answers(engine)
    finally:
        engine.close()


@pytest.mark.parametrize(
    "agents,mesh,kills",
    [
        (2, "", 1),
        pytest.param(3, "", 0, marks=pytest.mark.long),
        pytest.param(3, "", 1, marks=pytest.mark.long),
        pytest.param(2, "tp=2", 1, marks=pytest.mark.long),
    ],
)
def test_answers_are_those_of_one_agent(kwargs, one, monkeypatch, agents, mesh, kills):
    if mesh:
        monkeypatch.setenv("XLA_FLAGS", fake_devices.flags(8))
    seats = share_out(agents, 1)

    def start(agent, served, notify):
        own = {**kwargs, "models": list(served) or kwargs["models"], "mesh": mesh}
        return ProcessEngine(FACTORY, own, seat=seats[agent], notify=notify)

    engine = Cluster(start, agents, backoff_seconds=0.01)
    try:
        assert answers(engine, kills) == one
        assert kills or all(agent.stats.generated_tokens for agent in engine.agents())
    finally:
        engine.close()
