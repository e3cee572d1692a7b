"""Agents of one chain in spans, driven step by step on the test's own thread, so that what meets what is
drawn by the test and not by the machine."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.faults.port import FaultyPort
from jblock.engine.api import Output, Request
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.span_placement import HOME, Place, SpanPlacement, layers_of
from jblock.engine.loop import Loop
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.runner.runner import Runner
from jblock.engine.spans.messages import Gone, Message, Rows
from jblock.zoo.store import Zoo

# Programs that an agent of these settings has made, for those of the same.
_MADE: dict[tuple[EngineConfig, Path], dict] = {}


@dataclasses.dataclass
class Mailbox:
    """A port whose messages wait until the test hands them over.

    Attributes:
      agent: whose.
      sent: what is on its way from here: (to, message, rows).
    """

    agent: int
    sent: list[tuple[int, Message, Any]] = dataclasses.field(default_factory=list)

    def send(self, agent: int, message: Message, rows: Any = None) -> None:
        """See `Port`."""
        self.sent.append((agent, message, rows))

    def listen(self, receive: Callable) -> None:
        """Nobody listens: the test does."""

    def close(self) -> None:
        """Nothing to do."""


class SpanAgents:
    """Several agents.

    Attributes:
      loops: of each, the home first.
      ports: of each.
      faulty: over those.
      frozen: agents that take no turn.
      outputs: of the home, by request.
    """

    def __init__(
        self, zoo: Path, models: Sequence[str], configs: Sequence[EngineConfig], place: Place | None
    ):
        """One agent for each of `configs`; one alone has whole chains where `place` is None."""
        self._zoo, self._models, self._configs, self._place = zoo, models, configs, place
        self.ports = [Mailbox(agent) for agent in range(len(configs))]
        self.faulty = [FaultyPort(port) for port in self.ports]
        self.frozen: set[int] = set()
        self.loops = [self._make(agent) for agent in range(len(configs))]
        self.outputs: dict[str, list[Output]] = {}

    def _make(self, agent: int) -> Loop:
        store, config = Zoo.open(self._zoo), self._configs[agent]
        spans = SpanPlacement(agent, self._place) if self._place else None
        graph = assemble(store, {m: store.chain(m) for m in self._models}, config, spans=spans)
        device = Runner(graph, config, ExecutableCache(self._zoo.parent / "executables"))
        device.executables._table = _MADE.setdefault((config, self._zoo), {})
        loop = Loop(graph, device, config, port=self.faulty[agent] if spans else None)
        loop.loads.preload([route.needs for route in graph.routes.values()])
        return loop

    def restart(self, agent: int) -> None:
        """An agent forgets all, and what was on its way from it is lost; the others hear of it."""
        self.ports[agent].sent[:] = [
            (to, Gone(), None) for to in range(len(self.loops)) if to != agent
        ]
        self.faulty[agent] = FaultyPort(self.ports[agent])
        self.loops[agent] = self._make(agent)

    def submit(self, request: Request) -> None:
        """To the home."""
        self.loops[HOME].submit(request)

    def run(
        self, draw: random.Random | None = None, disturb: Callable[[], None] = lambda: None
    ) -> dict[str, list[int]]:
        """Steps agents and hands messages over until nothing is left; tokens by request.

        Args:
          draw: which agent goes next; None: in turn.
          disturb: called before each turn.
        """
        turn = 0
        while not self._done:
            disturb()
            agents = len(self.loops)
            agent = draw.randrange(agents) if draw else turn % agents
            turn += 1
            assert turn < 20_000, [loop.stats() for loop in self.loops]
            if agent in self.frozen:
                continue
            self.deliver(agent, draw.randrange(4) if draw else None)
            for output in self.loops[agent].step():
                assert agent == HOME
                self.outputs.setdefault(output.request_id, []).append(output)
        return {
            name: [t for output in outputs for t in output.token_ids]
            for name, outputs in self.outputs.items()
        }

    def deliver(self, agent: int, most: int | None = None) -> None:
        """Hands over messages that an agent has sent, in order."""
        sent = self.ports[agent].sent
        for to, message, rows in sent[:most]:
            loop = self.loops[to]
            assert loop.spans is not None and isinstance(message, Rows) == (rows is not None)
            loop.spans.take((agent, message, rows), loop.graph.routes)
        del sent[:most]

    @property
    def _done(self) -> bool:
        return self.loops[HOME].idle and not any(port.sent for port in self.ports)

    def check_clean(self) -> None:
        """Nobody holds anything any more."""
        for loop in self.loops:
            while not loop.stalled:
                loop.step()
            stats = loop.stats()
            assert stats.running == stats.waiting == 0
            assert (stats.pages_free, stats.rows_free) == (stats.pages_total, stats.rows_total)


def by_layers(agents: Sequence[int]) -> Place:
    """Layer i of every chain on agent `agents[i % len(agents)]`."""

    def place(chain, specs):
        found = [HOME] * len(specs)
        for number, run in enumerate(layers_of(specs)[:-1]):
            for i in run:
                found[i] = agents[number % len(agents)]
        return found

    return place
