"""Agents with a span of every chain each, in processes of one machine, behind one engine's boundary.

The first agent is the home of all sequences: requests go to it, and it alone answers. Hidden rows go between
the agents themselves (`jblock/engine/spans/sockets.py`). Each process is supervised by itself: while one is
replaced, sequences wait, and are computed anew once it is there. Nothing here sees a step, and nothing
imports jax.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

from jblock.engine import api
from jblock.engine.groups.together import models_of_all, serve_on_all, stats_of_pipeline
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine

# How often agents are looked at while one is not up.
_LOOK_SECONDS = 0.05

Start = Callable[[int, Sequence[str], Callable[[], None]], ProcessEngine]
"""Starts a process of this agent that serves these chains ("name@version"; none: those of its configuration),
and calls the function when it has something to say."""


class Pipeline(api.Engine):
    """Implements `jblock.engine.api.Engine` over them. `poll` does the supervising, so it has to be called
    all the time, from one thread."""

    def __init__(self, start: Start, agents: int, *, backoff_seconds: float | None = None):
        """Starts the agents' processes and returns at once; `models` waits for them.

        Args:
          start: see `Start`; called now and after every death.
          agents: how many; the first one is the home.
          backoff_seconds: see `SupervisedEngine`.
        """
        self._arrived = threading.Event()
        self._closed = False
        options = {} if backoff_seconds is None else {"backoff_seconds": backoff_seconds}
        self._agents: list[SupervisedEngine] = []
        try:
            for index in range(agents):

                def begin(served: Sequence[str], index: int = index) -> ProcessEngine:
                    return start(index, served, self._arrived.set)

                self._agents.append(SupervisedEngine(begin, **options))
        except BaseException:
            self.close()
            raise
        self._home = self._agents[0]

    @property
    def is_up(self) -> bool:
        """Whether all agents compute."""
        return all(agent.is_up for agent in self._agents)

    @property
    def pids(self) -> list[int]:
        """Process ids of the agents; 0 where there is none just now."""
        return [agent.pid for agent in self._agents]

    def models(self) -> tuple[api.ModelInfo, ...]:
        """The served chains, each with the length that every agent can serve; blocks until all are warm.

        Raises:
          ValueError: the factory refused its arguments.
          EngineDied: an agent ended before it was warm, or cannot be brought back.
        """
        return models_of_all(self._agents)

    def submit(self, request: api.Request) -> None:
        """Hands a request to the home; never blocks."""
        self._home.submit(request)
        self._arrived.set()

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end; never blocks."""
        self._home.cancel(request_id)
        self._arrived.set()

    def poll(self, timeout: float) -> list[api.Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: an agent cannot be brought back.
        """
        end = time.monotonic() + timeout
        while not self._closed:
            self._arrived.clear()
            for agent in self._agents[1:]:
                agent.poll(0.0)
            outputs = self._home.poll(0.0)
            if any(output.token_ids for output in outputs):
                for agent in self._agents[1:]:
                    agent.note_service()
            left = end - time.monotonic()
            if outputs or left <= 0:
                return outputs
            calm = self._home.is_free and self.is_up
            self._arrived.wait(left if calm else min(left, _LOOK_SECONDS))
        return []

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """Serves exactly these chains, the home last. Where one agent cannot, those before it go back.

        Raises:
          UnknownChain, ValueError: an agent refused; nothing changed.
          EngineDied: an agent's process died over this change, which is not made again.
        """
        serve_on_all(reversed(self._agents), models, base)
        return self.models()

    def stats(self) -> api.EngineStats:
        """Counters and gauges of the home; what lies on agents, of all of them."""
        return stats_of_pipeline(*(agent.stats() for agent in self._agents))

    def agents(self) -> tuple[api.AgentStatus, ...]:
        """Each agent by itself."""
        return tuple(
            api.AgentStatus(
                name=str(index),
                up=agent.is_up,
                models=tuple(f"{m.name}@{m.version}" for m in agent.served),
                requests=stats.running + stats.waiting,
                stats=stats,
            )
            for index, agent in enumerate(self._agents)
            for stats in [agent.stats()]
        )

    def close(self) -> None:
        """Stops all agents."""
        self._closed = True
        self._arrived.set()
        if self._agents:
            with concurrent.futures.ThreadPoolExecutor(len(self._agents)) as pool:
                list(pool.map(lambda agent: agent.close(), self._agents))
