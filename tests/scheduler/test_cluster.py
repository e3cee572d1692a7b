"""Several agents behind one boundary: routing, deaths, changes of what is served."""

import collections
import dataclasses
import functools
import os
import signal

import pytest
from mock_agents import Agents
from polled import LONG, Reader, echoed, request, until

from jblock.engine import api
from jblock.engine.process.seats import share_out
from jblock.scheduler.chain_placement import ChainPlacement, everywhere
from jblock.scheduler.cluster import Cluster

KILLER, FREEZER = 500, 501
A_B_C = [{"name": "a"}, {"name": "b", "offset": 1}, {"name": "c", "offset": 2}]


@pytest.fixture
def cluster():
    """Makes a cluster, its reader and what starts its agents; all are gone afterwards."""
    made = []

    def make(count: int = 2, heartbeat_seconds: float = 0.0, seats=None, options=None, **kwargs):
        agents = Agents(heartbeat_seconds, seats, **kwargs)
        engine = Cluster(agents, count, backoff_seconds=0.01, **(options or {}))
        reader = Reader(engine)
        reader.start()
        made.append((engine, reader))
        engine.models()
        return engine, reader, agents

    yield make
    for engine, reader in made:
        reader.stopping = True
        reader.join(LONG)
        engine.close()


def where(engine: Cluster) -> list[int]:
    """How many open requests each agent has."""
    return [agent.requests for agent in engine.agents()]


def test_requests_go_to_the_agent_with_the_fewest_and_are_answered_once(cluster):
    engine, reader, _ = cluster(3)
    for i in range(9):
        engine.submit(request(f"r{i}", (i, i + 1), max_tokens=100))
    assert where(engine) == [3, 3, 3]
    until(lambda: len(reader.ends) == 9)
    for i in range(9):
        assert reader.tokens[f"r{i}"] == echoed((i, i + 1), 100)
    assert where(engine) == [0, 0, 0]
    assert engine.stats().generated_tokens == 900
    assert all(agent.stats.generated_tokens == 300 for agent in engine.agents())


def test_prompts_with_a_beginning_that_an_agent_has_go_there_unless_it_is_much_busier(cluster):
    engine, reader, _ = cluster(2)
    long = tuple(range(2, 202))
    engine.submit(request("first", long, max_tokens=900))
    engine.submit(request("other", (5,), max_tokens=900))
    assert where(engine) == [1, 1]
    for i in range(4):
        engine.submit(request(f"same{i}", (*long[:130], 400 + i), max_tokens=800))
    assert where(engine) == [5, 1]
    # Another tenant's, and another model's, decide nothing; nor does a prefix where the agent has more than
    # four requests more.
    engine.submit(
        dataclasses.replace(request("salted", long, max_tokens=800), cache_salt="other tenant")
    )
    assert where(engine) == [5, 2]
    for name, expected in (("near", [6, 2]), ("as near", [7, 2]), ("far", [7, 3])):
        engine.submit(request(name, long, max_tokens=800))
        assert where(engine) == expected
    for name in list(engine._open):
        engine.cancel(name)
    until(lambda: len(reader.ends) == 10)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)]
)
def test_what_an_agent_had_goes_on_in_another_one(cluster, how):
    engine, reader, agents = cluster(2, 2.0 if how == signal.SIGSTOP else 0.0)
    prompts = {f"r{i}": (i + 1, i + 2, i + 3) for i in range(8)}
    for i, (name, prompt) in enumerate(prompts.items()):
        drawn = {"temperature": 1.0, "seed": i} if i % 2 else {}
        engine.submit(request(name, prompt, max_tokens=300, **drawn))
    until(lambda: len(reader.tokens) == 8 and all(len(t) > 4 for t in reader.tokens.values()))
    assert where(engine) == [4, 4]
    # The process that replaces it is not needed for them.
    agents.slow = 2.0
    os.kill(engine.pids[0], how)
    until(lambda: not engine.agents()[0].up and where(engine)[0] == 0)
    until(lambda: len(reader.ends) == 8)
    for i, (name, prompt) in enumerate(prompts.items()):
        plain = echoed(prompt, 300)
        drawn = [(t + hash((i, at))) % 512 for at, t in enumerate(plain)]
        assert reader.tokens[name] == (drawn if i % 2 else plain)
    until(lambda: all(agent.up for agent in engine.agents()))
    assert engine.stats().restarts >= 1 and engine.stats().resumed_requests == 4
    for i in range(4):
        engine.submit(request(f"later{i}", max_tokens=100))
    assert where(engine) == [2, 2]
    until(lambda: len(reader.ends) == 12)


@pytest.mark.parametrize(
    "how", ["kill_token", pytest.param("freeze_token", marks=pytest.mark.long)]
)
def test_the_one_that_ends_processes_is_refused_alone(cluster, how):
    limit = 2.0 if how == "freeze_token" else 0.0
    engine, reader, _ = cluster(3, limit, **{how: KILLER, "fatal_after": 6})
    for i in range(24):
        prompt = (KILLER, 3) if i == 13 else (i + 1, i + 2)
        engine.submit(request(f"r{i}", prompt, max_tokens=40))
    until(lambda: len(reader.ends) == 24, 4 * LONG)
    errors = {n: e for n, e in reader.ends.items() if e.finish_reason == "error"}
    assert list(errors) == ["r13"] and errors["r13"].error_code == "INTERNAL"
    for i in range(24):
        if i != 13:
            assert reader.tokens[f"r{i}"] == echoed((i + 1, i + 2), 40)
    # It ended two agents' processes while others computed there, and then that of one alone.
    assert engine.stats().restarts <= 8
    assert sum(agent.stats.restarts > 1 for agent in engine.agents()) <= 1


def halves(chains, agents):
    """The first chain on the first agent, the others on the last."""
    first, last = min(agents), max(agents)
    return {name: [first if name == "a" else last] for name in chains}


def test_a_request_goes_to_an_agent_that_serves_its_chain(cluster):
    options = {"models": ["a", "b", "c"], "place": halves}
    engine, reader, agents = cluster(2, models=A_B_C, options=options)
    assert agents.started == [(0, ("a",)), (1, ("b", "c"))]
    assert [m.name for m in engine.models()] == ["a", "b", "c"]
    assert [agent.models for agent in engine.agents()] == [("a@1",), ("b@1", "c@1")]
    for i in range(6):
        engine.submit(request(f"b{i}", (4, 5), "b", max_tokens=50))
    assert where(engine) == [0, 6]
    engine.submit(request("a", (4, 5), "a", max_tokens=50))
    engine.submit(request("x", (4, 5), "x"))
    until(lambda: len(reader.ends) == 8)
    assert reader.tokens["a"] == echoed((4, 5), 50)
    assert all(reader.tokens[f"b{i}"] == echoed((4, 5), 50, 1) for i in range(6))
    assert reader.ends["x"].error_code == "NOT_FOUND"
    # Nobody else has it: it waits for the process that replaces the one that died.
    engine.submit(request("late", (4, 5), "b", max_tokens=200))
    until(lambda: len(reader.tokens["late"]) > 4)
    os.kill(engine.pids[1], signal.SIGKILL)
    until(lambda: "late" in reader.ends)
    assert reader.tokens["late"] == echoed((4, 5), 200, 1)
    assert agents.started[2:] == [(1, ("b@1", "c@1"))]


@pytest.mark.long
def test_an_agent_that_does_not_come_back_is_given_up_and_its_chains_go_elsewhere(cluster):
    options = {"models": ["a", "b", "c"], "place": halves}
    engine, reader, agents = cluster(3, models=A_B_C, options=options)
    # Nothing is placed on the second one, so it serves all.
    assert [len(agent.models) for agent in engine.agents()] == [1, 3, 2]
    epoch = engine.placement.epoch
    agents.broken |= {1, 2}
    for agent in (1, 2):
        os.kill(engine.pids[agent], signal.SIGKILL)
    engine.submit(request("b", (4, 5), "b", max_tokens=100))
    until(lambda: "b" in reader.ends)
    assert reader.tokens["b"] == echoed((4, 5), 100, 1)
    until(lambda: engine.agents()[0].models == ("a@1", "b@1", "c@1"))
    assert engine.placement.epoch > epoch
    assert engine.is_up and [agent.up for agent in engine.agents()] == [True, False, False]
    agents.broken.add(0)
    os.kill(engine.pids[0], signal.SIGKILL)
    until(lambda: reader.failure is not None)
    assert isinstance(reader.failure, api.EngineDied)


def test_all_agents_change_what_they_serve_or_none(cluster):
    more = [
        {"name": "echo", "version": 2, "offset": 1},
        {"name": "late", "offset": 5},
        {"name": "big", "misfit": "big: does not fit"},
    ]
    engine, reader, _ = cluster(2, more=more)
    engine.submit(request("old", (4,), max_tokens=200))
    until(lambda: len(reader.tokens["old"]) > 2)
    infos = engine.serve(["echo", "late"])
    assert [(m.name, m.version) for m in infos] == [("echo", 2), ("late", 1)]
    assert [agent.models for agent in engine.agents()] == [("echo@2", "late@1")] * 2
    with pytest.raises(ValueError, match="does not fit"):
        engine.serve(["echo@2", "late@1", "big"])
    with pytest.raises(api.UnknownChain):
        engine.serve(["echo@2", "late@1", "nobody"])
    assert [agent.models for agent in engine.agents()] == [("echo@2", "late@1")] * 2
    for i in range(4):
        engine.submit(dataclasses.replace(request(f"n{i}", (4,)), version=2))
    engine.submit(dataclasses.replace(request("gone", (4,)), version=1))
    until(lambda: len(reader.ends) == 6)
    assert reader.tokens["old"] == [4] * 200
    assert all(reader.tokens[f"n{i}"] == [5] * 60 for i in range(4))
    assert reader.ends["gone"].error_code == "ABORTED"


def test_where_one_agent_refuses_the_others_go_back():
    class Picky(Agents):
        def __call__(self, agent, served, notify):
            self._kwargs["more"] = [{"name": "late", "misfit": "too big" if agent else ""}]
            return super().__call__(agent, served, notify)

    engine = Cluster(Picky(), 3)
    try:
        with pytest.raises(ValueError, match="too big"):
            engine.serve(["echo", "late"])
        assert [agent.models for agent in engine.agents()] == [("echo@1",)] * 3
        assert list(engine.placement.agents) == ["echo"]
    finally:
        engine.close()


def test_cancelling_and_ids_in_flight():
    engine = Cluster(Agents(), 2)
    try:
        engine.models()
        ends = []
        for _ in range(2):
            engine.submit(request("r", max_tokens=900))
        until(lambda: ends.extend(o for o in engine.poll(0.1) if o.finish_reason) or ends)
        assert "already in flight" in ends.pop().error_message
        engine.cancel("r")
        engine.cancel("nobody")
        until(lambda: ends.extend(o for o in engine.poll(0.1) if o.finish_reason) or ends)
        assert [end.finish_reason for end in ends] == ["cancelled"]
        assert where(engine) == [0, 0]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [({"fail_at_start": "zoo: none"}, ValueError), ({"exit_at_start": 3}, api.EngineDied)],
)
def test_a_first_start_that_fails_ends_it(kwargs, error):
    engine = Cluster(Agents(**kwargs), 2)
    try:
        with pytest.raises(error):
            engine.models()
    finally:
        engine.close()


def test_each_agent_has_its_processors_and_devices(cluster):
    cores = sorted(os.sched_getaffinity(0))[:2]
    seats = share_out(2, 2, cores)
    engine, _, _ = cluster(2, seats=seats)
    for index, pid in enumerate(engine.pids):
        own = {cores[index * len(cores) // 2]}
        threads = os.listdir(f"/proc/{pid}/task")
        assert all(os.sched_getaffinity(int(thread)) == own for thread in threads)
    assert seats[1].environment["JAX_CUDA_VISIBLE_DEVICES"] == "2,3"
    assert seats[1].environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"


@pytest.mark.parametrize("agents,cores", [(1, 8), (3, 8), (4, 2), (8, 64)])
def test_processors_are_shared_out_evenly(agents, cores):
    seats = share_out(agents, 1, range(100, 100 + cores))
    sizes = [len(seat.cores) for seat in seats]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    used = collections.Counter(core for seat in seats for core in seat.cores)
    assert len(used) == cores and max(used.values()) == max(1, -(-agents // cores))


def test_a_placement_names_an_agent_that_is_there_for_every_chain():
    placement = ChainPlacement().placed(["a@2", "b"], [0, 2], everywhere)
    assert placement.agents == {"a": frozenset({0, 2}), "b": frozenset({0, 2})}
    assert placement.epoch == 1 and placement.without(2).agents["b"] == {0}
    with pytest.raises(ValueError, match="'b' is placed on no agent"):
        placement.placed(["a", "b"], [0], lambda chains, agents: {"a": [0], "b": [1]})


def test_agents_are_told_apart_in_metrics(cluster):
    prometheus = pytest.importorskip("prometheus_client")
    from serving.metrics import Metrics

    engine, reader, agents = cluster(2)
    engine.submit(request("r", max_tokens=20))
    until(lambda: "r" in reader.ends)
    until(functools.partial(tokens_are, engine, 20))
    agents.broken.add(1)
    os.kill(engine.pids[1], signal.SIGKILL)
    until(lambda: not engine.agents()[1].up)
    metrics = Metrics(engine.stats, lambda: 0, lambda: 1, agents=engine.agents)
    text = prometheus.generate_latest(metrics.registry).decode()
    assert "jblock_generated_tokens_total 20.0" in text
    assert 'jblock_agent_generated_tokens_total{agent="0"} 20.0' in text
    assert 'jblock_agent_up{agent="0"} 1.0' in text and 'jblock_agent_up{agent="1"} 0.0' in text
    agents.broken.clear()


def tokens_are(engine: Cluster, count: int) -> bool:
    return engine.stats().generated_tokens == count
