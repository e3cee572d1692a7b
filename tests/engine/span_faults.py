"""Faults drawn at random in agents that a test steps by itself, on a clock of the test's own."""

import random

import jax
import pytest
from span_agents import SpanAgents

from bench.faults.port import KINDS as MESSAGE_KINDS
from jblock.engine.kv_cache.page_pool import OutOfPages, PagePool
from jblock.engine.loop import Loop
from jblock.engine.spans import guests, home, spans

KINDS = ("restart", "freeze", *MESSAGE_KINDS, "pages", "device_memory", "clock")
_TURN_SECONDS = 0.05
_LONGEST = 60  # turns of a fault


class Clock:
    """Stands in for the module `time` in agents.

    Attributes:
      now: what it says.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """See `time.monotonic`."""
        return self.now


class Faults:
    """Called before each turn of an agent.

    Attributes:
      left: faults that are still to come.
      drawn: kinds of those that came.
    """

    def __init__(
        self, agents: SpanAgents, count: int, draw: random.Random, patch: pytest.MonkeyPatch
    ):
        self.left, self.drawn = count, []
        self._agents, self._draw = agents, draw
        self._clock, self._turn = Clock(), 0
        self._told: dict[str, int] = {}
        self._ends: list[tuple[int, str, int]] = []
        for module in (guests, home, spans):
            patch.setattr(module, "time", self._clock)
        allocate, num_free = PagePool.allocate, PagePool.num_free

        def few(pool: PagePool, count: int) -> list[int]:
            if count and self._lasts("pages"):
                raise OutOfPages("drawn")
            return allocate(pool, count)

        patch.setattr(PagePool, "allocate", few)
        none = property(lambda pool: 0 if self._lasts("pages") else num_free.fget(pool))
        patch.setattr(PagePool, "num_free", none)

    def _lasts(self, kind: str) -> bool:
        return any(kind == one for _, one, _ in self._ends)

    def __call__(self) -> None:
        self._turn += 1
        self._clock.now += _TURN_SECONDS
        for due, kind, agent in [end for end in self._ends if end[0] <= self._turn]:
            self._ends.remove((due, kind, agent))
            if kind == "freeze":
                self._agents.frozen.discard(agent)
            elif kind == "delay":
                self._agents.faulty[agent].release()
        # Whoever gets no token over three restarts is refused, so all get one before the next fault.
        if self.left and self._went_on and self._draw.random() < 0.05:
            self.left -= 1
            self._told = {name: len(self._agents.outputs.get(name, ())) for name in self._open}
            self._begin(self._draw.choice(KINDS), self._draw.randrange(len(self._agents.loops)))

    @property
    def _open(self) -> list[str]:
        return [s.request.request_id for s in self._agents.loops[0]._sequences]

    @property
    def _went_on(self) -> bool:
        outputs, told = self._agents.outputs, self._told
        return all(len(outputs.get(n, ())) > told[n] for n in self._open if n in told)

    def settle(self) -> None:
        """All faults end, and so much time passes that agents ask each other about what was lost."""
        self._ends.clear()
        self._agents.frozen.clear()
        for _ in range(40):
            self._clock.now += 1.0
            for agent, loop in enumerate(self._agents.loops):
                self._agents.faulty[agent].release()
                self._agents.deliver(agent)
                loop.step()

    def _begin(self, kind: str, agent: int) -> None:
        self.drawn.append(kind)
        agents, count = self._agents, self._draw.randint(1, 3)
        self._ends.append((self._turn + self._draw.randint(1, _LONGEST), kind, agent))
        if kind == "restart":
            agents.restart(max(agent, 1))
        elif kind == "freeze":
            agents.frozen.add(agent)
        elif kind in MESSAGE_KINDS:
            agents.faulty[agent].misbehave(kind, count)
        elif kind == "device_memory":
            _fail_once(agents.loops[agent])
        elif kind == "clock":
            self._clock.now += self._draw.uniform(1, 30)


def _fail_once(loop: Loop) -> None:
    """The device has no memory for its next step; one that ran alone would be refused, and rightly."""
    forward = loop._forward

    def fail() -> None:
        loop._forward = forward  # type: ignore[method-assign]
        if len(loop._sequences.running) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: drawn")
        forward()

    loop._forward = fail  # type: ignore[method-assign]
