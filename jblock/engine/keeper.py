"""What goes on behind the loop: compiling in tiers, and preparing other sets of chains.

One thread does both, so that a graph never changes under a compilation. The loop is only ever handed
something complete: chains that were not served before are read, and all programs there, before it changes
over.
"""

import concurrent.futures
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from absl import logging

from jblock.engine.api import EngineDied
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import Route, ServingGraph
from jblock.engine.programs.needed import Pools, resize_keys
from jblock.engine.runner.runner import PoolPlan, Runner
from jblock.engine.weights.lease import Lease
from jblock.engine.weights.loader import Targets
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


class Job(NamedTuple):
    """Chains to serve, or None for those that are served; projections to have tables for, or None to make
    the segments anew; and who waits for it."""

    chains: dict[str, Chain] | None
    targets: Targets | None
    done: concurrent.futures.Future[ServingGraph]


class Keeper:
    """Owns the graph that is served, and what is compiled for it.

    Attributes:
      graph: what new requests are served by.
    """

    def __init__(
        self,
        zoo: Zoo,
        graph: ServingGraph,
        device: Runner,
        config: EngineConfig,
        warm: Callable[[ServingGraph, Sequence[Route]], list[Lease]],
        resize: Callable[[Pools], None],
        switch: Callable[[ServingGraph, list[Lease], Pools], None],
        retire: Callable[[], None],
    ):
        """Compiles the first tier before it returns.

        Args:
          zoo: where chains are read from.
          graph: what is served first.
          device: whose programs are made.
          config: of the agent.
          warm: has routes of a graph that is not taken up yet read, as far as there is room, and
            returns their leases.
          resize: has the loop change the sizes of its pools; returns when it has.
          switch: hands the loop another graph, the leases it may give back then, and the sizes of pools
            once no request runs on the old one; returns when it has taken the graph up.
          retire: has the loop let go of what no request needs.
        """
        self.graph = graph
        self._zoo, self._device, self._config = zoo, device, config
        self._warm, self._resize, self._switch = warm, resize, switch
        self._retire = retire
        self._failed: set[Hashable] = set()
        self._closing = threading.Event()
        self._settled = threading.Event()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._make(graph, config.first_buckets, greedy_only=True)
        device.buckets, device.greedy_only = config.first_buckets, True
        self._thread = threading.Thread(target=self._run, name="jblock-keeper", daemon=True)

    def start(self) -> None:
        """Begins the background work; the loop must be there."""
        self._thread.start()

    def serve(self, chains: dict[str, Chain]) -> ServingGraph:
        """Serves exactly these chains, by name. Blocks until new requests are served so; those in
        flight end on what they started with.

        Raises:
          ValueError: a chain cannot be read or does not fit; nothing changed.
          EngineDied: the engine was closed meanwhile.
        """
        return self._submit(Job(chains, {}, concurrent.futures.Future())).result()

    def renew(self) -> None:
        """Compiles the segments of what is served anew and swaps them in while requests run.

        Raises:
          EngineDied: the engine was closed meanwhile.
        """
        self._submit(Job(None, None, concurrent.futures.Future())).result()

    def widen(self, targets: Targets) -> concurrent.futures.Future[ServingGraph]:
        """Has tables made for more projections of the components of some specs."""
        return self._submit(Job(None, targets, concurrent.futures.Future()))

    def _submit(self, job: Job) -> concurrent.futures.Future[ServingGraph]:
        self._jobs.put(job)
        if self._closing.is_set():
            self._drop_jobs()
        return job.done

    @property
    def settled(self) -> bool:
        """Whether every tier is compiled."""
        return self._settled.is_set()

    def settle(self) -> None:
        """Waits until every tier is compiled."""
        self._settled.wait()

    def close(self) -> None:
        """Stops after the program that is being compiled."""
        self._closing.set()
        self._settled.set()
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._drop_jobs()

    def _drop_jobs(self) -> None:
        """Nobody must wait for a job that will not be done."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.done.set_exception(EngineDied("the engine was closed; build another one"))

    def _run(self) -> None:
        """Jobs as they come; between them, what is not compiled yet."""
        while not self._closing.is_set():
            work = self._missing()
            if work is None:
                self._settled.set()
            try:
                job = self._jobs.get(block=work is None)
            except queue.Empty:
                if work is not None:
                    work()
                continue
            if job is not None:
                self._settled.clear()
                self._do(job)

    def _missing(self) -> Callable[[], None] | None:
        """The next thing to compile: what requests with options need, then more grids, then segments
        for the grids there are."""
        config, device = self._config, self._device
        if device.greedy_only:
            return self._add_options
        for bucket in (*config.decode_buckets, *config.prefill_buckets):
            if bucket not in device.buckets and bucket not in self._failed:
                return functools.partial(self._try, bucket, functools.partial(self._add, bucket))
        keys = [
            key
            for key in dict.fromkeys(device.segment_keys(self.graph))
            if key not in device.executables and key not in self._failed
        ][: config.compile_workers]
        if keys:
            make = functools.partial(
                device.executables.warm, keys, config.compile_workers, stop=self._closing
            )
            return functools.partial(self._try, keys[0], make)
        return None

    def _try(self, what: Hashable, make: Callable[[], None]) -> None:
        try:
            make()
        except Exception:
            self._failed.add(what)
            logging.exception("%s could not be compiled; the other programs serve on", what)

    def _add_options(self) -> None:
        """From here on every request is admitted, compiled for or not."""
        self._try("what sampling needs", lambda: self._make(self.graph, self._device.buckets))
        self._device.greedy_only = False

    def _add(self, bucket: Bucket) -> None:
        self._make(self.graph, (bucket,))
        if not self._closing.is_set():
            grids = {*self._device.buckets, bucket}
            self._device.buckets = tuple(sorted(grids, key=lambda b: (b.q_len, b.num_seqs)))

    def _do(self, job: Job) -> None:
        try:
            if job.targets is None:
                keys = self._device.segment_keys(self.graph)
                self._device.executables.renew(keys, self._closing)
                job.done.set_result(self.graph)
                return
            now = self.graph.routes
            chains = job.chains
            if chains is None:
                chains = {name: route.chain for name, route in now.items()}
            graph = assemble(self._zoo, chains, self._config, self.graph, job.targets)
            pools = self._prepare_pools(graph)
            if self._closing.is_set():
                raise ValueError("the engine is being closed")
            fresh = [
                route
                for name, route in graph.routes.items()
                if name not in now or now[name].chain != route.chain or name in graph.pinned
            ]
            try:
                # Where the memory is full, pools make room before weights come.
                self._resize(pools.during)
                self._switch(graph, self._warm(graph, fresh), pools.after)
            except Exception:
                self._resize(self._device.pools_for(self.graph))
                raise
            self.graph = graph
            job.done.set_result(graph)
        except Exception as e:
            job.done.set_exception(e)
        finally:
            if self._device.pools_held:
                self._device.pools_held = False
                self._retire()

    def _prepare_pools(self, graph: ServingGraph) -> PoolPlan:
        """Sizes of the pools while requests still run on what was served before, and after that, with every
        program for both.

        Raises:
          ValueError: the memory does not hold them, or what is served would have to be cut short.
        """
        device, old = self._device, self.graph
        device.pools_held = True
        plan = device.plan_pools(graph)
        for pools in (plan.during, plan.after):
            device.check(old, graph, pools)
        self._make(old, device.buckets, pools=plan.during)
        self._make(graph, device.buckets, pools=plan.during)
        self._make(graph, device.buckets, pools=plan.after)
        stages = (device.pool_shapes, plan.during, plan.after, device.pool_shapes)
        keys = [k for pair in itertools.pairwise(stages) for k in resize_keys(*pair)]
        device.executables.warm(keys, self._config.compile_workers, stop=self._closing)
        return plan

    def _make(
        self,
        graph: ServingGraph,
        buckets: Sequence[Bucket],
        *,
        pools: Pools | None = None,
        greedy_only: bool = False,
    ) -> None:
        """Every program the graph can ask for on these grids, compiled or from the cache."""
        self._device.executables.warm(
            self._device.program_keys(graph, buckets, pools, greedy_only=greedy_only),
            self._config.compile_workers,
            stop=self._closing,
        )
