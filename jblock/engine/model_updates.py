"""Load, unload and widen: build a graph, make its programs, read what it needs, then switch.

Each update runs on its caller's thread, or on one of its own, never on the loop's: the loop is only handed
something complete. Updates take turns from the moment they build their graph, for each builds on the last.
What may hang, the reading of new chains, comes before (`read_ahead.py`).
"""

import itertools
import threading
from collections.abc import Callable, Sequence

from jblock.engine.api import EngineDied
from jblock.engine.compile_tiers import CompileTiers
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import Route, ServingGraph
from jblock.engine.programs.needed import Pools, resize_keys
from jblock.engine.runner.runner import PoolPlan, Runner
from jblock.engine.weights.lease import Lease
from jblock.engine.weights.loader import Targets
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

Change = Callable[[dict[str, Chain]], dict[str, Chain]]
"""From the chains that are served, by name, to those that are to be."""


class ModelUpdates:
    """Owns the graph that is served.

    Attributes:
      graph: what new requests are served by.
    """

    def __init__(
        self,
        zoo: Zoo,
        graph: ServingGraph,
        device: Runner,
        config: EngineConfig,
        tiers: CompileTiers,
        *,
        warm: Callable[[ServingGraph, Sequence[Route]], list[Lease]],
        resize: Callable[[Pools], None],
        switch: Callable[[ServingGraph, list[Lease], Pools], None],
        retire: Callable[[ServingGraph | None], None],
    ):
        """Updates a graph.

        Args:
          zoo: where chains are read from.
          graph: what is served first.
          device: whose programs are made.
          config: of the agent.
          tiers: makes the programs.
          warm: has routes of a graph that is not taken up yet read, as far as there is room, and
            returns their leases.
          resize: has the loop change the sizes of its pools; returns when it has.
          switch: hands the loop another graph, the leases it may give back then, and the sizes of pools
            once no request runs on the old one; returns when it has taken the graph up.
          retire: has the loop let go of what no request needs, and of a graph that is not taken up after all.
        """
        self.graph = graph
        self._zoo, self._device, self._config, self._tiers = zoo, device, config, tiers
        self._warm, self._resize, self._switch, self._retire = warm, resize, switch, retire

    def update(self, change: Change, targets: Targets) -> ServingGraph:
        """Serves other chains. Blocks until new requests are served so; those in flight end on what they
        started with.

        Args:
          change: applied to what is served when its turn comes.
          targets: what to make tables for, beside what there are some for.

        Raises:
          ValueError: a chain cannot be read or does not fit; nothing changed.
          EngineDied: the engine was closed meanwhile.
        """
        with self._tiers.paused():
            if self._tiers.closing.is_set():
                raise EngineDied("the engine was closed; build another one")
            old = self.graph
            now = {name: route.chain for name, route in old.routes.items()}
            abandoned: ServingGraph | None = None
            # From here on nothing leaves that the new graph may take over.
            self._device.pools_held = True
            self._retire(None)
            try:
                abandoned = graph = assemble(self._zoo, change(now), self._config, old, targets)
                self._change_over(graph)
                abandoned = None
            finally:
                self._device.pools_held = False
                self._retire(abandoned)
            self.graph = graph
            self._tiers.take_up(graph)
            return graph

    def widen(self, targets: Targets, failed: Callable[[Exception], None]) -> None:
        """Has tables made for more projections of the components of some specs, on a thread of its own;
        `failed` hears of an error."""

        def run() -> None:
            try:
                self.update(lambda chains: chains, targets)
            except Exception as error:
                failed(error)

        threading.Thread(target=run, name="jblock-widen", daemon=True).start()

    def _change_over(self, graph: ServingGraph) -> None:
        """Makes programs, reads, and switches."""
        now = self.graph.routes
        pools = self._prepare_pools(graph)
        if self._tiers.closing.is_set():
            raise EngineDied("the engine was closed; build another one")
        fresh = [
            route
            for name, route in graph.routes.items()
            if name not in now
            or now[name].chain != route.chain
            or now[name].adapter is not route.adapter  # whose tables have another size
            or name in graph.pinned
        ]
        try:
            # Where the memory is full, pools make room before tables and weights come.
            self._resize(pools.during)
            graph.make_tables()
            self._switch(graph, self._warm(graph, fresh), pools.after)
        except Exception:
            self._resize(self._device.pools_for(self.graph))
            raise

    def _prepare_pools(self, graph: ServingGraph) -> PoolPlan:
        """Sizes of the pools while requests still run on what was served before, and after that, with every
        program for both.

        Raises:
          ValueError: the memory does not hold them, or what is served would have to be cut short.
        """
        device, old, make = self._device, self.graph, self._tiers.make
        plan = device.plan_pools(graph)
        for pools in (plan.during, plan.after):
            device.check(old, graph, pools)
        make(old, device.buckets, pools=plan.during)
        make(graph, device.buckets, pools=plan.during)
        make(graph, device.buckets, pools=plan.after)
        stages = (device.pool_shapes, plan.during, plan.after, device.pool_shapes)
        keys = [k for pair in itertools.pairwise(stages) for k in resize_keys(*pair)]
        device.executables.warm(keys, self._config.compile_workers, stop=self._tiers.closing)
        return plan
