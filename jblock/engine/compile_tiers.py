"""What is compiled when: the first grids before the first request, everything else behind the loop.

In order: one grid for decoding and one for prefill, for greedy requests; what requests with options need;
more grids; segments. Each grid is used from the step after its programs are there.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

from absl import logging

from jblock.engine.api import EngineDied
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.graph import ServingGraph
from jblock.engine.kv_cache import free_memory
from jblock.engine.programs.needed import Pools
from jblock.engine.runner.runner import Runner


class CompileTiers:
    """Compiles in a thread what the served graph lacks.

    Attributes:
      closing: set once nothing more is to be compiled.
    """

    def __init__(self, graph: ServingGraph, device: Runner, config: EngineConfig):
        """Compiles the first tier before it returns; `start` begins the others."""
        self.closing = threading.Event()
        self._programs = threading.Lock()
        self._turns = threading.Condition()
        self._pauses = 0
        self._graph, self._device, self._config = graph, device, config
        self._failed: set[Hashable] = set()
        self._warm_up_done = threading.Event()
        self._more = threading.Event()
        self.make(graph, config.first_buckets, greedy_only=True)
        device.buckets, device.greedy_only = config.first_buckets, True
        self._thread = threading.Thread(target=self._run, name="jblock-compile", daemon=True)

    def start(self) -> None:
        """Begins the background work."""
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While a graph is built, its programs are made and it is taken up: no grid comes into use meanwhile
        that has programs of the old graph alone. Begins after the program that is being compiled; pauses take
        turns."""
        with self._turns:
            self._pauses += 1
        try:
            with self._programs:
                self._warm_up_done.clear()
                yield
        finally:
            with self._turns:
                self._pauses -= 1
                self._turns.notify_all()
            self._more.set()

    def take_up(self, graph: ServingGraph) -> None:
        """Goes on with another graph, whose programs for the grids there are were made; while paused."""
        self._graph = graph

    @property
    def warm_up_done(self) -> bool:
        """Whether every tier is compiled."""
        return self._warm_up_done.is_set()

    def wait_until_warm(self) -> None:
        """Waits until every tier is compiled."""
        self._warm_up_done.wait()

    def renew(self) -> None:
        """Compiles the segments of what is served anew and swaps them in while requests run.

        Raises:
          EngineDied: the engine was closed meanwhile.
        """
        with self.paused():
            keys = self._device.segment_keys(self._graph)
            self._device.executables.renew(keys, self.closing)
        if self.closing.is_set():
            raise EngineDied("the engine was closed; build another one")

    def close(self) -> None:
        """Stops after the program that is being compiled."""
        self.closing.set()
        self._warm_up_done.set()
        self._more.set()
        with self._turns:
            self._turns.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def make(
        self,
        graph: ServingGraph,
        buckets: Sequence[Bucket],
        *,
        pools: Pools | None = None,
        greedy_only: bool = False,
    ) -> None:
        """Every program a graph can ask for on these grids, compiled or from the cache."""
        self._device.executables.warm(
            self._device.program_keys(graph, buckets, pools, greedy_only=greedy_only),
            self._config.compile_workers,
            stop=self.closing,
        )

    def _run(self) -> None:
        while not self.closing.is_set():
            self._more.clear()
            with self._turns:
                self._turns.wait_for(lambda: not self._pauses or self.closing.is_set())
            with self._programs:
                work = None if self.closing.is_set() else self._missing()
                if work is not None:
                    work()
                elif not self._more.is_set():
                    free_memory.give_back()
                    self._warm_up_done.set()
            if work is None:
                self._more.wait()

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
            for key in dict.fromkeys(device.segment_keys(self._graph))
            if key not in device.executables and key not in self._failed
        ][: config.compile_workers]
        if keys:
            make = functools.partial(
                device.executables.warm, keys, config.compile_workers, stop=self.closing
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
        self._try("what sampling needs", lambda: self.make(self._graph, self._device.buckets))
        self._device.greedy_only = False

    def _add(self, bucket: Bucket) -> None:
        self.make(self._graph, (bucket,))
        if not self.closing.is_set():
            grids = {*self._device.buckets, bucket}
            self._device.buckets = tuple(sorted(grids, key=lambda b: (b.q_len, b.num_seqs)))
