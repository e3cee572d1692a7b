"""Chains that go over several agents of one process: each agent a thread with devices of its own and a span
of every chain. The first one is the home of all sequences (`spans/`)."""

import dataclasses
from collections.abc import Sequence

from jblock.engine.api import Engine, EngineStats, ModelInfo, Output, ReportRunning, Request
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.graph.span_placement import HOME, Place, even_spans
from jblock.engine.groups.replicas import group_config, group_placements
from jblock.engine.groups.together import models_of_all, serve_on_all, stats_of_pipeline
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.spans.port import LocalPort
from jblock.parallel.placement import Placement
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


class PipelineEngine(Engine):
    """An `api.Engine` over the agents of a mesh with `pp`."""

    def __init__(
        self,
        zoo: Zoo,
        chains: dict[str, Chain],
        config: EngineConfig,
        cache: ExecutableCache | None = None,
        placements: Sequence[Placement] | None = None,
        place: Place | None = None,
    ):
        """Builds the agents, the home last. Sizes in `config` are of each agent, but memory that it states is
        of all of them together.

        Args:
          zoo, chains, config, cache: as of `ThreadEngine`.
          placements: devices of each agent; None: those of this process, in order.
          place: the agent of each step of a chain; None: spans of equal size.

        Raises:
          ZooError, ValueError: as `ThreadEngine`; or there are too few devices.
        """
        shape = config.sharding.mesh
        if shape.dp > 1:
            raise ValueError(
                f"mesh {config.mesh!r}: a chain is cut over pp, or copied over dp: give one"
            )
        # A sequence that gives way is computed anew: its KV lies on several agents.
        inner = dataclasses.replace(group_config(config), host_kv_memory_mb=0)
        placements = group_placements(config) if placements is None else placements
        ports: dict[int, LocalPort] = {}
        for agent, placement in enumerate(placements):
            ports[agent] = LocalPort(agent, ports, placement)
        place = place or even_spans(len(placements))
        self._agents: dict[int, ThreadEngine] = {}
        try:
            for agent in reversed(range(len(placements))):
                port, on = ports[agent], placements[agent]
                self._agents[agent] = ThreadEngine(
                    zoo, chains, inner, cache, on, place=place, port=port
                )
        except BaseException:
            self.close()
            raise

    @property
    def _home(self) -> ThreadEngine:
        return self._agents[HOME]

    def models(self) -> tuple[ModelInfo, ...]:
        """The served chains, each with the length that every agent can serve."""
        return models_of_all(reversed(self._agents.values()))

    def submit(self, request: Request) -> None:
        """Hands a request to its home."""
        self._home.submit(request)

    def cancel(self, request_id: str) -> None:
        """Asks for a request to be ended."""
        self._home.cancel(request_id)

    def report_running(self, report: ReportRunning) -> None:
        """The home reports what it computes, and so what the others do."""
        self._home.report_running(report)

    def poll(self, timeout: float) -> list[Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the loop of an agent is gone.
        """
        outputs = self._home.poll(timeout)
        for engine in self._agents.values():
            engine.check_alive()
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges of the home; what lies on agents, of all of them."""
        others = [engine.stats() for agent, engine in self._agents.items() if agent != HOME]
        return stats_of_pipeline(self._home.stats(), *others)

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[ModelInfo, ...]:
        """Serves exactly these chains; see `ThreadEngine.serve`. Where one agent cannot, those before it go
        back."""
        serve_on_all(self._agents.values(), models, base)
        return self.models()

    def wait_until_warm(self) -> None:
        """Waits until every agent's background compiler has nothing left to do."""
        for engine in self._agents.values():
            engine.wait_until_warm()

    def close(self) -> None:
        """Stops all agents, the home first."""
        for engine in reversed(self._agents.values()):
            engine.close()
