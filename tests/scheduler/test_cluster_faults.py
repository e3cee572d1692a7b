"""Faults drawn at random over four agents under load: nothing is lost, told twice, different or stuck."""

import contextlib
import os
import random
import signal
import time

import pytest
from mock_agents import Agents
from polled import LONG, Reader, echoed, request, until

from jblock.engine import api
from jblock.scheduler.cluster import Cluster

AGENTS, OPEN = 4, 24
# A request takes half a second of steps; the rest is for what happens to it, on a busy machine.
STUCK = LONG
MORE = [{"name": "late", "offset": 3}]


class Load:
    """Keeps so many requests open, and knows what each has to answer."""

    def __init__(self, engine: Cluster, reader: Reader, rng: random.Random):
        self.wanted: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self._engine, self._reader, self._rng = engine, reader, rng

    def fill(self) -> None:
        """Submits as many as are missing."""
        while len(self.wanted) - len(self._reader.ends) < OPEN:
            rng, number = self._rng, len(self.wanted)
            name, count = f"r{number}", rng.randint(20, 100)
            prompt = tuple(rng.randrange(400) for _ in range(rng.choice((3, 70, 140))))
            plain = echoed(prompt, count)
            drawn = {}
            if rng.random() < 0.5:
                drawn = {"temperature": 1.0, "seed": number}
                plain = [(t + hash((number, at))) % 512 for at, t in enumerate(plain)]
            self.wanted[name] = plain
            self._engine.submit(request(name, prompt, max_tokens=count, **drawn))

    def cancel_one(self) -> None:
        """A client leaves."""
        name = self._rng.choice([n for n in self.wanted if n not in self._reader.ends])
        self.cancelled.add(name)
        self._engine.cancel(name)


def fault(rng: random.Random, engine: Cluster, load: Load) -> None:
    """One thing that goes wrong, or changes."""
    pids = [pid for pid in engine.pids if pid]
    kind = rng.choice(["kill", "kill", "two", "stop", "freeze", "cancel", "models"])
    if kind == "cancel":
        load.cancel_one()
    elif kind == "models":
        # An agent may have frozen before, and nobody has noticed it yet.
        with contextlib.suppress(api.EngineDied):
            engine.serve(rng.choice([["echo"], ["echo", "late"]]))
    elif kind == "stop":
        pid = rng.choice(pids)
        send(pid, signal.SIGSTOP)
        time.sleep(0.3)
        send(pid, signal.SIGCONT)
    elif kind == "freeze":
        send(rng.choice(pids), signal.SIGSTOP)
    else:
        for pid in rng.sample(pids, 2 if kind == "two" else 1):
            send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    """A signal, unless the process has ended meanwhile: one that froze before is killed some time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@pytest.mark.parametrize(
    "seed,faults", [(1, 10), *(pytest.param(s, 25, marks=pytest.mark.long) for s in (2, 3, 4, 5))]
)
def test_nothing_is_lost_or_told_twice(seed, faults):
    rng = random.Random(seed)
    engine = Cluster(Agents(heartbeat_seconds=2.0, more=MORE), AGENTS, backoff_seconds=0.01)
    reader = Reader(engine)
    reader.start()
    load = Load(engine, reader, rng)
    try:
        engine.models()
        for _ in range(faults):
            load.fill()
            until(lambda: all(a.up for a in engine.agents()) and not engine.stats().suspects)
            load.fill()
            before = engine.stats().generated_tokens
            fault(rng, engine, load)
            until(lambda before=before: engine.stats().generated_tokens > before)
        until(lambda: reader.failure or len(reader.ends) == len(load.wanted), STUCK)
        assert reader.failure is None  # it refuses what is told twice
        for name, tokens in load.wanted.items():
            end = reader.ends[name]
            if name in load.cancelled and end.finish_reason == "cancelled":
                assert reader.tokens[name] == tokens[: len(reader.tokens[name])]
            else:
                assert end.finish_reason == "length", end
                assert reader.tokens[name] == tokens
        assert len({agent.models for agent in engine.agents()}) == 1
        assert [agent.requests for agent in engine.agents()] == [0] * AGENTS
    finally:
        reader.stopping = True
        reader.join(LONG)
        engine.close()
