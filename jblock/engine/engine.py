"""The engine in one process: builds an agent from a zoo and runs its loop in a thread."""

import concurrent.futures
import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import logging

from jblock.engine.api import (
    Engine,
    EngineDied,
    EngineStats,
    ModelInfo,
    Output,
    ReportRunning,
    Request,
)
from jblock.engine.compile_tiers import CompileTiers
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import Route, ServingGraph
from jblock.engine.graph.span_placement import Place, SpanPlacement
from jblock.engine.kv_cache import free_memory
from jblock.engine.loop import Loop
from jblock.engine.model_infos import model_infos
from jblock.engine.model_updates import ModelUpdates
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.needed import Pools
from jblock.engine.runner.rates import measure_rates
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling.fairness import VirtualTokenCounter
from jblock.engine.spans.port import Port
from jblock.engine.stats import StatsSnapshot
from jblock.engine.watchdog import Watch
from jblock.engine.weights.lease import Lease
from jblock.engine.weights.loader import Loads, Targets, weights_of
from jblock.engine.weights.read_ahead import read_new
from jblock.engine.weights.readers import Done, Readers
from jblock.engine.weights.residents import Adapter
from jblock.parallel.placement import Placement
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

T = TypeVar("T")
# Between looks at what is waiting, when nothing runs.
_STALL_SECONDS = 0.01
# A step of a working engine takes a fraction of a second, a few where a machine swaps.
_STUCK_SECONDS = 300.0

# What the loop's thread is told: a request, an id to cancel, something to do between steps, None to end.
Message = Request | str | Callable[[Loop], object] | None


class ThreadEngine(Engine):
    """An `api.Engine` whose loop is a thread of this process."""

    def __init__(
        self,
        zoo: Zoo,
        chains: dict[str, Chain],
        config: EngineConfig,
        cache: ExecutableCache | None = None,
        placement: Placement | None = None,
        outbox: queue.SimpleQueue[list[Output]] | None = None,
        counter: VirtualTokenCounter | None = None,
        place: Place | None = None,
        port: Port | None = None,
    ):
        """Loads the chains that fit, without their adapters, compiles the first tier of programs and
        starts the loop; the other tiers follow in the background, and each grid is used as soon as its
        programs are there. Adapters, and what did not fit, are read when a request asks for them; pinned
        chains at once.

        It runs on the devices of this process that its mesh needs, unless a placement is given. Outbox
        and counter are those of several engines together. Where chains are cut into spans on several agents,
        `place` says where and the port leads to the others.

        Raises:
          ZooError: a chain or component that cannot be read.
          ValueError: settings that do not fit the chains.
        """
        self._zoo = zoo
        placement = placement or Placement.on(config.sharding)
        if placement.rules.mesh.dp * placement.rules.mesh.pp > 1:
            raise ValueError(f"mesh {config.mesh!r}: build a DataParallelEngine or PipelineEngine")
        spans = SpanPlacement(port.agent, place) if port is not None and place is not None else None
        graph = assemble(zoo, chains, config, placement=placement, spans=spans)
        self._readers = Readers(config.read_seconds)
        loads = self._loads = Loads(graph.zoo, graph.placement, graph.resident_set, config)
        loads.background = self._in_turn
        # Weights first: what they leave free is the KV's.
        loads.preload(weights_of(graph.resident_set))
        free_memory.give_back()
        device = self._device = Runner(graph, config, cache, placement)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox = outbox or queue.SimpleQueue()
        self._death: BaseException | None = None
        self._watch = Watch()
        self._tiers = CompileTiers(graph, device, config)
        self._updates = ModelUpdates(
            zoo,
            graph,
            device,
            config,
            self._tiers,
            warm=self._warm,
            resize=self._resize,
            switch=self._switch,
            retire=self._retire,
        )
        if config.host_kv_memory_mb:
            device.rates = measure_rates(device, graph)
        self._models = model_infos(zoo, graph, device)
        self._naming = threading.Lock()
        self._loop = Loop(graph, device, device.config, loads, counter, port)
        loads.preload([graph.routes[name].needs for name in graph.pinned])
        while self._loop.measure():
            pass
        self._measured = threading.Event()
        self._stats = StatsSnapshot(self._loop.stats)
        self._port = port
        put, spans_here = self._inbox.put, self._loop.spans
        if port is not None and spans_here is not None:
            take = spans_here.take
            port.listen(lambda *sent: put(lambda loop: take(sent, loop.graph.routes)))
        loads.background, loads.widen_tables = self._in_background, self._widen
        self._loop.constrained.grammars.notify = lambda: self._inbox.put(lambda loop: None)
        self._thread = threading.Thread(target=self._run, name="jblock-engine", daemon=True)
        self._thread.start()
        self._tiers.start()

    def models(self) -> tuple[ModelInfo, ...]:
        """The served chains."""
        return self._models

    def submit(self, request: Request) -> None:
        """Hands a request to the loop."""
        self._inbox.put(request)

    def cancel(self, request_id: str) -> None:
        """Asks the loop to end a request."""
        self._inbox.put(request_id)

    def report_running(self, report: ReportRunning) -> None:
        """Has the ids of the sequences in a step reported before it begins, where they changed."""
        self._inbox.put(lambda loop: setattr(loop, "report_running", report))

    def poll(self, timeout: float) -> list[Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the loop is gone, or has been in one step for minutes.
        """
        try:
            outputs = list(self._outbox.get(timeout=timeout))
        except queue.Empty:
            self.check_alive()
            return []
        while not self._outbox.empty():
            outputs.extend(self._outbox.get())
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges, as they were a moment ago."""
        return self._stats.with_background(
            self._device.executables.compiles_in_background, self._readers.hung
        )

    def close(self) -> None:
        """Stops the loop and waits for it."""
        self._tiers.closing.set()
        self._readers.close()
        if self._port is not None:
            self._port.close()
        self._inbox.put(None)
        self._thread.join()
        self._loop.constrained.grammars.close()
        self._tiers.close()

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[ModelInfo, ...]:
        """Serves exactly these chains from the next step on: "name" in its live version, or
        "name@version".

        Raises:
          UnknownChain: the zoo does not have one; nothing changed.
          ValueError: a chain cannot be read, or does not fit; nothing changed.
        """
        routes = self._updates.graph.routes
        served = {f"{name}@{r.chain.version}": r.chain for name, r in routes.items()}
        seen = set(served) if base is None else set(base)
        added = [m for m in models if m not in seen and m not in served]
        parts = {step.component for route in routes.values() for step in route.chain.steps}
        try:
            found, targets = read_new(self._readers, self._zoo, added, parts)
        except OSError as error:
            if self._tiers.closing.is_set():
                raise EngineDied("the engine was closed; build another one") from error
            raise ValueError(f"{', '.join(added)} cannot be read: {error}") from error
        names, before = ({m.partition("@")[0] for m in own} for own in (models, seen))

        def change(now: dict[str, Chain]) -> dict[str, Chain]:
            # What others changed since this call came stays as it is.
            chains = {n: c for n, c in now.items() if n in names or n not in before}
            chains |= {chain.name: chain for chain in found}
            if not chains:
                raise ValueError("no model would be served; name at least one")
            return chains

        graph = self._updates.update(change, targets)
        with self._naming:
            if graph is self._updates.graph:
                self._models = model_infos(self._zoo, graph, self._device, self._models)
            return self._models

    def renew(self) -> None:
        """Compiles the programs that run several layers at once anew, and swaps each in while requests
        run: for when the compiled ones are not trusted any more. Blocks until all are there.

        Raises:
          EngineDied: the engine was closed meanwhile.
        """
        self._tiers.renew()

    def wait_until_warm(self) -> None:
        """Waits until the background compiler has nothing left to do, and on an idle engine until all
        programs are measured."""
        self._tiers.wait_until_warm()
        while self._loop.idle and self._thread.is_alive() and not self._measured.wait(0.01):
            pass

    def _warm(self, graph: ServingGraph, routes: Sequence[Route]) -> list[Lease]:
        """See ModelUpdates."""
        done: concurrent.futures.Future[list[Lease]] = concurrent.futures.Future()

        def warm(loop: Loop) -> None:
            try:
                loop.loads.warm(graph.resident_set, [r.needs for r in routes], done)
            except Exception as error:
                done.set_exception(error)

        self._inbox.put(warm)
        return self._wait(done)

    def _resize(self, pools: Pools) -> None:
        """See ModelUpdates."""
        self._between_steps(lambda loop: loop.resize_pools(pools))

    def _retire(self, abandoned: ServingGraph | None) -> None:
        """See ModelUpdates."""

        def retire(loop: Loop) -> None:
            if abandoned is not None:
                loop.loads.note_replaced(abandoned.resident_set)
            loop.retire()

        with contextlib.suppress(EngineDied):
            self._between_steps(retire)

    def _switch(self, graph: ServingGraph, leases: list[Lease], pools: Pools) -> None:
        """See ModelUpdates."""

        def take_up(loop: Loop) -> None:
            loop.switch(graph, pools)
            self._measured.clear()
            for lease in leases:
                loop.weight_cache.release(lease)

        self._between_steps(take_up)

    def _between_steps(self, work: Callable[[Loop], None]) -> None:
        """Has the loop do something between two steps, and waits until it is done.

        Raises:
          EngineDied: the loop ended.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run(loop: Loop) -> None:
            try:
                work(loop)
            except Exception as e:
                done.set_exception(e)
            else:
                done.set_result(None)

        self._inbox.put(run)
        self._wait(done)

    def _wait(self, done: concurrent.futures.Future[T]) -> T:
        """What the loop's thread answers.

        Raises:
          EngineDied: it ended.
        """
        while True:
            try:
                return done.result(1.0)
            except TimeoutError:
                if done.done():
                    raise
                self.check_alive()

    def _in_turn(self, kind: str, name: str, work: Callable[[], Any], done: Done) -> None:
        """See `loader.Background`; for as long as there is no loop, on the caller's own thread."""
        read = functools.partial(self._readers.run, kind, name, work)
        self._loads.defer(read, done)

    def _in_background(self, kind: str, name: str, work: Callable[[], Any], done: Done) -> None:
        """See `loader.Background`."""

        def answer(result: Any, error: Exception | None) -> None:
            self._inbox.put(lambda loop: done(result, error))

        self._readers.submit(kind, name, work, answer)

    def _widen(self, targets: Targets, adapter: Adapter) -> None:
        """Has tables made; what cannot be made, the adapter's requests hear of."""

        def failed(error: Exception) -> None:
            words = f"{adapter.name} cannot be served: {error}"
            self._inbox.put(lambda loop: loop.weight_cache.refuse(adapter, words))

        self._updates.widen(targets, failed)

    def check_alive(self) -> None:
        """Raises EngineDied if the loop is gone or stuck."""
        if not self._thread.is_alive():
            raise EngineDied(f"the engine's loop ended: {self._death or 'it was closed'}")
        if self._watch.seconds() > _STUCK_SECONDS:
            raise EngineDied(
                f"the engine's loop has been in one step for over {_STUCK_SECONDS:.0f} seconds: a "
                "device call does not return; restart the server, and look at the device's own log"
            )

    def _measure(self) -> bool:
        """Times one call of a program, if that disturbs nobody: a request that comes meanwhile waits for
        no more than this call. False: nothing to time, or not now."""
        if self._measured.is_set() or not self._tiers.warm_up_done:
            return False
        if self._loop.measure() or self._loop.profile.measure_again():
            return True
        self._measured.set()
        return False

    def _run(self) -> None:
        try:
            while self._receive():
                outputs = self._loop.step()
                self._stats.take(outputs, idle=self._loop.idle)
                if outputs:
                    self._outbox.put(outputs)
        except BaseException as e:
            logging.exception("the engine's loop failed")
            self._death = e

    def _receive(self) -> bool:
        """Takes all messages in; waits for one only when there is nothing to do. False: stop."""
        while True:
            try:
                idle = self._loop.idle
                if idle and self._inbox.empty() and self._measure():
                    continue
                wait = None if idle and self._measured.is_set() else _STALL_SECONDS
                with self._watch.rest():
                    message = self._inbox.get(block=idle or self._loop.stalled, timeout=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            self._take(message)
            if self._inbox.empty():
                return True

    def _take(self, message: Request | str | Callable[[Loop], object]) -> None:
        """One message. One that fails, fails alone: a request gets an error, and what a call was about
        hears of it by its own means."""
        try:
            if isinstance(message, str):
                self._loop.cancel(message)
            elif isinstance(message, Request):
                self._loop.submit(message)
            else:
                message(self._loop)
        except Exception as error:
            logging.exception("a message to the engine's loop failed; the loop goes on")
            if isinstance(message, Request):
                words = f"the engine failed to take this request ({error!r}); its log says how"
                self._loop.refuse(message, "INTERNAL", words)
