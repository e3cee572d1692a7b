"""An agent's process in which things go wrong when it is told so, over a socket of its own."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import jax

from bench.faults.port import FaultyPort
from jblock.engine import factory
from jblock.engine.api import Engine
from jblock.engine.kv_cache.page_pool import OutOfPages, PagePool
from jblock.engine.loop import Loop
from jblock.zoo.store import Zoo


def build_engine(*, fault_folder: str, fault_agent: int, **kwargs: Any) -> Engine:
    """`jblock.engine.factory.build_engine`, with faults.

    Args:
      fault_folder: where the sockets lie that faults are told over.
      fault_agent: which agent this is.
      kwargs: of the engine.
    """
    faults = _Faults()
    faults.install()
    path = socket_of(Path(fault_folder), fault_agent)
    path.unlink(missing_ok=True)
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(path))
    threading.Thread(target=faults.listen, args=(told,), name="faults", daemon=True).start()
    return factory.build_engine(**kwargs)


def socket_of(folder: Path, agent: int) -> Path:
    """Where an agent is told of faults."""
    return folder / f"faults-{agent}"


def tell(folder: Path, agent: int, kind: str, seconds: float, count: int) -> None:
    """Tells an agent of a fault; one that is not there hears nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        try:
            to.connect(str(socket_of(folder, agent)))
            to.send(json.dumps([kind, seconds, count]).encode())
        except OSError:
            return


class _Faults:
    """What goes wrong in this process, and until when."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._no_device_memory = False
        self._clock = time.monotonic
        self._ports: list[FaultyPort] = []

    def listen(self, told: socket.socket) -> None:
        """Takes faults until the process ends."""
        while True:
            kind, seconds, count = json.loads(told.recv(4096))
            if kind == "clock":
                self._step_clocks(seconds)
            elif kind == "device_memory":
                self._no_device_memory = True
            elif kind in ("pages", "slow_reads", "failing_reads"):
                self._until[kind] = self._clock() + seconds
            else:
                for port in self._ports:
                    port.misbehave(kind, count)
                    if kind == "delay":
                        threading.Timer(seconds, port.release).start()

    def _now(self, kind: str) -> bool:
        return self._clock() < self._until.get(kind, 0.0)

    def _step_clocks(self, seconds: float) -> None:
        """The time of day by minutes, forth and back; the clock that only goes forth by seconds, as after
        a pause."""
        wall, monotonic = time.time, time.monotonic
        time.time = lambda: wall() + 60 * seconds  # type: ignore[assignment]
        time.monotonic = lambda: monotonic() + abs(seconds)  # type: ignore[assignment]

    def install(self) -> None:
        """Makes faults possible in this process."""
        made, forward = factory.ThreadEngine, Loop._forward
        allocate, num_free = PagePool.allocate, PagePool.num_free

        def engine(*args: Any, port: Any = None, **kwargs: Any) -> Any:
            if port is not None:
                port = FaultyPort(port)
                self._ports.append(port)
            return made(*args, port=port, **kwargs)

        def no_memory(loop: Loop) -> None:
            # One that runs alone would be refused, and rightly.
            if self._no_device_memory and len(loop._sequences.running) > 1:
                self._no_device_memory = False
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a fault that was drawn")
            forward(loop)

        def no_pages(pool: PagePool, count: int) -> list[int]:
            if count and self._now("pages"):
                raise OutOfPages("a fault that was drawn")
            return allocate(pool, count)

        factory.ThreadEngine = engine  # type: ignore[misc,assignment]
        Loop._forward = no_memory  # type: ignore[method-assign]
        PagePool.allocate = no_pages  # type: ignore[method-assign]
        PagePool.num_free = property(  # type: ignore[method-assign,assignment]
            lambda pool: 0 if self._now("pages") else num_free.fget(pool)  # type: ignore[attr-defined]
        )
        for name in ("load_component", "load_delta", "load_tensor"):
            setattr(Zoo, name, self._read(getattr(Zoo, name)))

    def _read(self, read: Any) -> Any:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self._now("failing_reads"):
                raise OSError(os.strerror(5))
            if self._now("slow_reads"):
                time.sleep(0.5)
            return read(*args, **kwargs)

        return faulty
