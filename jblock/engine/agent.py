"""The engine in one process: builds an agent from a zoo and runs its loop in a thread."""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jblock.engine import swap
from jblock.engine.api import EngineDied, EngineStats, ModelInfo, Output, Request, UnknownChain
from jblock.engine.assembly import Assembly, assemble
from jblock.engine.config import EngineConfig
from jblock.engine.device import Device
from jblock.engine.executable_cache import ExecutableCache, default_folder
from jblock.engine.keeper import Keeper
from jblock.engine.loop import Loop
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.store import Zoo

# Between looks at what is waiting, when nothing runs.
_STALL_SECONDS = 0.01

Switch = tuple[Assembly, threading.Event]


class ThreadEngine:
    """An `api.Engine` whose loop is a thread of this process."""

    def __init__(
        self,
        zoo: Zoo,
        chains: dict[str, Chain],
        config: EngineConfig,
        cache: ExecutableCache | None = None,
    ):
        """Loads the chains, compiles the first tier of programs and starts the loop; the other tiers
        follow in the background, and each grid is used as soon as its programs are there.

        Raises:
          ZooError: a chain or component that cannot be read.
          ValueError: settings that do not fit the chains.
        """
        self._zoo = zoo
        assembly = assemble(zoo, chains, config)
        device = self._device = Device(assembly, config, cache)
        self._inbox: queue.SimpleQueue[Request | str | Switch | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
        self._death: BaseException | None = None
        self._keeper = Keeper(zoo, assembly, device, config, self._switch)
        if config.host_kv_memory_mb:
            device.rates = swap.measure(device, assembly)
        self._models = _model_infos(zoo, assembly, device)
        self._loop = Loop(assembly, device, config)
        while self._loop.measure():
            pass
        self._measured = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jblock-engine", daemon=True)
        self._thread.start()
        self._keeper.start()

    def models(self) -> tuple[ModelInfo, ...]:
        """The served chains."""
        return self._models

    def submit(self, request: Request) -> None:
        """Hands a request to the loop."""
        self._inbox.put(request)

    def cancel(self, request_id: str) -> None:
        """Asks the loop to end a request."""
        self._inbox.put(request_id)

    def poll(self, timeout: float) -> list[Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the loop is gone.
        """
        try:
            outputs = list(self._outbox.get(timeout=timeout))
        except queue.Empty:
            self._check_alive()
            return []
        while not self._outbox.empty():
            outputs.extend(self._outbox.get())
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges, at most a step old."""
        return self._loop.stats()

    def close(self) -> None:
        """Stops the loop and waits for it."""
        self._keeper.close()
        self._inbox.put(None)
        self._thread.join()

    def serve(self, models: Sequence[str]) -> tuple[ModelInfo, ...]:
        """Serves exactly these chains from the next step on: "name" in its live version, or
        "name@version".

        Raises:
          UnknownChain: the zoo does not have one; nothing changed.
          ValueError: a chain cannot be read, or does not fit; nothing changed.
        """
        chains = [_find_chain(self._zoo, model) for model in models]
        assembly = self._keeper.serve({chain.name: chain for chain in chains})
        self._models = _model_infos(self._zoo, assembly, self._device)
        return self._models

    def renew(self) -> None:
        """Compiles the programs that run several layers at once anew, and swaps each in while requests
        run: for when the compiled ones are not trusted any more. Blocks until all are there.

        Raises:
          EngineDied: the engine was closed meanwhile.
        """
        self._keeper.renew()

    def settle(self) -> None:
        """Waits until the background compiler has nothing left to do, and on an idle engine until all
        programs are measured."""
        self._keeper.settle()
        while self._loop.idle and self._thread.is_alive() and not self._measured.wait(0.01):
            pass

    def _switch(self, assembly: Assembly) -> None:
        taken = threading.Event()
        self._inbox.put((assembly, taken))
        while not taken.wait(1.0):
            self._check_alive()

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise EngineDied(f"the engine's loop ended: {self._death or 'it was closed'}")

    def _measure(self) -> bool:
        """Times one call of a program, if that disturbs nobody: a request that comes meanwhile waits for
        no more than this call. False: nothing to time, or not now."""
        if self._measured.is_set() or not self._keeper.settled:
            return False
        if self._loop.measure():
            return True
        self._measured.set()
        return False

    def _run(self) -> None:
        try:
            while self._receive():
                outputs = self._loop.step()
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
                message = self._inbox.get(block=idle or self._loop.stalled, timeout=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, str):
                self._loop.cancel(message)
            elif isinstance(message, Request):
                self._loop.submit(message)
            else:
                assembly, taken = message
                self._loop.switch(assembly)
                self._measured.clear()
                taken.set()
            if self._inbox.empty():
                return True


def build_engine(
    *,
    zoo: str,
    models: Sequence[str] = (),
    profiler_port: int = 0,
    executable_cache: str = "",
    **settings: Any,
) -> ThreadEngine:
    """An engine over a zoo on disk.

    Args:
      zoo: folder of the zoo.
      models: chain names to serve; all of the zoo's when empty.
      profiler_port: port an XLA profiler session may attach to; 0 opens none.
      executable_cache: folder of compiled programs; `executable_cache.default_folder()` when empty.
      **settings: fields of EngineConfig.

    Raises:
      ZooError: the zoo or a chain cannot be read.
      ValueError: a setting that cannot be used.
    """
    config = EngineConfig(**settings)
    store = Zoo.open(zoo)
    names = list(models) or store.chains()
    if not names:
        raise ZooError(
            f"zoo {zoo!r} has no chains; convert a model first: jblock-convert hf --help"
        )
    chains = {name: store.chain(name) for name in names}
    if profiler_port:
        jax.profiler.start_server(profiler_port)
    cache = ExecutableCache(Path(executable_cache) if executable_cache else default_folder())
    cache.prune()
    return ThreadEngine(store, chains, config, cache)


def _find_chain(zoo: Zoo, model: str) -> Chain:
    name, at, version = model.partition("@")
    known = zoo.chains()
    if name in known and not at:
        return zoo.chain(name)
    if name in known and version.isdecimal() and int(version) in zoo.versions(name):
        return zoo.chain(name, int(version))
    raise UnknownChain(
        f"{model!r} is not in the zoo, which has {', '.join(known)}; convert it first"
    )


def _model_infos(zoo: Zoo, assembly: Assembly, device: Device) -> tuple[ModelInfo, ...]:
    return tuple(
        ModelInfo(
            name=name,
            version=route.chain.version,
            family=route.chain.family,
            vocab_size=route.chain.vocab_size,
            max_model_len=device.max_model_len(route),
            tokenizer_path=str(zoo.tokenizer_path(route.chain.tokenizer))
            if route.chain.tokenizer
            else "",
            base=route.chain.base or "",
            blocks=len(route.instances),
            shared_blocks=route.shared_blocks,
        )
        for name, route in sorted(assembly.routes.items())
    )
