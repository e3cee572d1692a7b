"""In which groups decoding rows travel: full ones, however their prompts came."""

import dataclasses
import random
from pathlib import Path

import pytest
from harness import FIXTURES, SMALL, request
from span_agents import SpanAgents, by_layers

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.spans.messages import Rows

MODEL = "llama_gqa_untied"
STREAMS, TOKENS = 4, 60
CONFIG = dataclasses.replace(SMALL, host_kv_memory_mb=0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("departures") / "zoo"
    hf.convert(FIXTURES / "hf" / MODEL, path, MODEL, Progress(False))
    return path


def groups_sent(agents: SpanAgents, monkeypatch) -> list[tuple[int, int]]:
    """Of each group of decoding rows that the home sends from now on, its rows, and how many sequences
    decode by then."""
    groups, port = [], agents.ports[0]
    send, running = port.send, agents.loops[0]._sequences.running

    def note(agent, message, rows=None) -> None:
        if isinstance(message, Rows) and message.items[0].chunk == 1:
            decoding = sum(s.computed >= s.prefill for s in running.values())
            groups.append((len(message.items), decoding))
        send(agent, message, rows)

    monkeypatch.setattr(port, "send", note)
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_one_by_one_soon_travel_in_as_many_groups_as_there_are_agents(
    zoo, monkeypatch, seed
):
    asked = [request(f"r{i}", MODEL, (5 + i, 7), max_tokens=TOKENS) for i in range(STREAMS)]
    one = SpanAgents(zoo, (MODEL,), [CONFIG], None)
    for each in asked:
        one.submit(each)
    expected = one.run()
    agents = SpanAgents(zoo, (MODEL,), [CONFIG] * 2, by_layers([0, 1]))
    groups = groups_sent(agents, monkeypatch)
    left, draw = list(asked[1:]), random.Random(seed)
    agents.submit(asked[0])

    def come() -> None:
        if left and draw.random() < 0.2:
            agents.submit(left.pop())

    assert agents.run(draw, come) == expected
    sizes = [rows for rows, decoding in groups if decoding == STREAMS]
    # A row or two travel as they did when they were fewer until they meet the others.
    assert len(sizes) > TOKENS and sum(n != STREAMS // 2 for n in sizes) <= 4, groups
    agents.check_clean()


def test_a_request_alone_waits_for_nobody(zoo, monkeypatch):
    agents = SpanAgents(zoo, (MODEL,), [CONFIG] * 2, by_layers([0, 1]))
    groups = groups_sent(agents, monkeypatch)
    agents.submit(request("r", MODEL, (5, 7), max_tokens=10))
    agents.run()
    assert groups == [(1, 1)] * 9
    agents.check_clean()
