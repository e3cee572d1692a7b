"""Data parallel groups: an engine on each, behind one boundary.

Every group of devices has weights, adapters, KV pages and a loop of its own, so nothing is ever sent between
groups, and each is exactly the engine its mesh without `dp` would be. A request goes to the group with the
fewest open ones and stays there.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Sequence

import jax

from jblock.engine.api import Engine, EngineStats, ModelInfo, Output, ReportRunning, Request
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.groups.together import models_of_all, serve_on_all
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.scheduling.fairness import VirtualTokenCounter
from jblock.engine.stats_records import total
from jblock.parallel.placement import Placement
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


class DataParallelEngine(Engine):
    """An `api.Engine` over the groups of a mesh with `dp`."""

    def __init__(
        self,
        zoo: Zoo,
        chains: dict[str, Chain],
        config: EngineConfig,
        cache: ExecutableCache | None = None,
    ):
        """Builds the groups' engines, one after another. Sizes in `config` are of each group, but memory
        that it states is of all of them together.

        Raises:
          ZooError, ValueError: as `ThreadEngine`; or there are too few devices.
        """
        inner = group_config(config)
        self._outbox: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # Request id -> its group and how many requests of this id are open there.
        self._open: dict[str, tuple[int, int]] = {}
        self._engines: list[ThreadEngine] = []
        counter = VirtualTokenCounter()
        try:
            for placement in group_placements(config):
                self._engines.append(
                    ThreadEngine(zoo, chains, inner, cache, placement, self._outbox, counter)
                )
        except BaseException:
            self.close()
            raise

    def models(self) -> tuple[ModelInfo, ...]:
        """The served chains, each with the length that every group can serve."""
        return models_of_all(self._engines)

    def submit(self, request: Request) -> None:
        """Hands a request to the group with the fewest open ones."""
        with self._lock:
            loads = [0] * len(self._engines)
            for of, count in self._open.values():
                loads[of] += count
            # A second one of an id goes where the first is, which refuses it.
            group, count = self._open.get(request.request_id, (loads.index(min(loads)), 0))
            self._open[request.request_id] = group, count + 1
            self._engines[group].submit(request)

    def cancel(self, request_id: str) -> None:
        """Asks for a request to be ended."""
        with self._lock:
            group, _ = self._open.get(request_id, (0, 0))
            self._engines[group].cancel(request_id)

    def report_running(self, report: ReportRunning) -> None:
        """Each group reports what it computes; no request is in two of them."""
        for engine in self._engines:
            engine.report_running(report)

    def poll(self, timeout: float) -> list[Output]:
        """Outputs of all groups since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the loop of a group is gone.
        """
        deadline = time.monotonic() + timeout
        outputs: list[Output] = []
        try:
            outputs.extend(self._outbox.get(timeout=max(deadline - time.monotonic(), 0)))
            while True:
                outputs.extend(self._outbox.get_nowait())
        except queue.Empty:
            pass
        for engine in self._engines:
            engine.check_alive()
        with self._lock:
            for output in outputs:
                if output.finish_reason and output.request_id in self._open:
                    group, count = self._open.pop(output.request_id)
                    if count > 1:
                        self._open[output.request_id] = group, count - 1
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges of all groups added up."""
        of_groups = [engine.stats() for engine in self._engines]
        # The groups charge tenants together.
        return dataclasses.replace(total(of_groups), tenants=of_groups[0].tenants)

    def close(self) -> None:
        """Stops all groups."""
        for engine in self._engines:
            engine.close()

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[ModelInfo, ...]:
        """Serves exactly these chains in every group; see `ThreadEngine.serve`. Where one group cannot, those
        before it go back."""
        serve_on_all(self._engines, models, base)
        return self.models()

    def wait_until_warm(self) -> None:
        """Waits until every group's background compiler has nothing left to do."""
        for engine in self._engines:
            engine.wait_until_warm()


def group_config(config: EngineConfig) -> EngineConfig:
    """The settings of one group, or of one agent of a pipeline."""
    shape = config.sharding.mesh
    mesh = dataclasses.replace(shape, dp=1, pp=1)

    def share(total: int) -> int:
        return -(-total // (shape.dp * shape.pp))

    return dataclasses.replace(
        config,
        mesh="" if mesh.size == 1 else str(mesh),
        kv_memory_mb=share(config.kv_memory_mb),
        host_kv_memory_mb=share(config.host_kv_memory_mb),
        host_cache_mb=share(config.host_cache_mb),
    )


def group_placements(
    config: EngineConfig, devices: Sequence[jax.Device] | None = None, *, abstract: bool = False
) -> list[Placement]:
    """Where each group is.

    Raises:
      ValueError: there are too few devices.
    """
    whole = Placement.on(config.sharding, devices, abstract=abstract)
    rules = group_config(config).sharding
    size = rules.mesh.size
    return [
        Placement(rules, whole.devices[first : first + size], abstract)
        for first in range(0, len(whole.devices), size)
    ]
