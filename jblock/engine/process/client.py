"""The engine in a process of its own, behind the same interface.

The server's event loop and the engine's loop then never wait for one another's interpreter lock,
the server needs no jax, and a crash of the engine does not end the server.
"""

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from jblock.engine import api
from jblock.engine.process import wire
from jblock.engine.process.child import Child, LocalChild
from jblock.engine.process.seats import WHOLE_MACHINE, Seat

FACTORY = "jblock.engine.factory:build_engine"
"""The factory of the real engine."""

# Seconds a child gets to end by itself once told to.
_CLOSE_SECONDS = 10.0
# How much longer a child that is not idle may be silent.
_BUSY_FACTOR = 6


class ProcessEngine(api.Engine):
    """Implements `jblock.engine.api.Engine` over a child process.

    The child builds the real engine with a factory named as "module:function" and plain keyword
    arguments; see `jblock.engine.process.server` for its side. Nothing here blocks on the child:
    one thread writes to it, one reads from it, one watches its heartbeat.
    """

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        heartbeat_seconds: float = 0.0,
        seat: Seat = WHOLE_MACHINE,
        notify: Callable[[], None] = lambda: None,
        begin: Callable[[], Child] = LocalChild,
        localize: Callable[[api.ModelInfo], api.ModelInfo] = lambda info: info,
    ):
        """Starts the child and returns at once; `models` waits for it.

        Args:
          factory: "module:function"; the function returns an Engine.
          kwargs: its arguments: None, bools, ints, floats, strings, and lists and maps of them.
          heartbeat_seconds: a child that is silent for longer is frozen and is killed; 0 never. While it
            has a thread that runs, or wants to, it may be silent for six times as long: the machine may be
            busy, or its main thread in a long call.
          seat: the processors and devices it has.
          notify: called from a thread of its own when `poll` would return something, or raise.
          begin: starts the child: on this machine, or on another host.
          localize: what the child says of a chain, with folders of this machine.

        Raises:
          TypeError: an argument is no plain data.
        """
        start = wire.pack(
            wire.Start(
                factory, dict(kwargs or {}), heartbeat_seconds, seat.cores, dict(seat.environment)
            )
        )
        self._notify, self._localize = notify, localize
        self._changed = threading.Condition()
        self._models: tuple[api.ModelInfo, ...] | None = None
        self._numbers = itertools.count()
        self._served: dict[int, wire.Served] = {}  # answers to `serve`, by its number
        # What each step brought; an empty tuple when there will be no more.
        self._steps: queue.SimpleQueue[tuple[api.Output, ...]] = queue.SimpleQueue()
        self._packed_stats = b""  # As they came last.
        self._stats = self._packed_stats, api.EngineStats()  # Those that were looked at last.
        self._running: set[str] = set()
        self._frames = 0
        self._invalid: str | None = None
        self._died: str | None = None
        self._told = ""
        self._closed = self._has_news = False
        self._up = True  # A child that is shared says where it is not.
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._child = begin()
        targets = [self._write, self._read]
        self._threads = [
            threading.Thread(target=target, name=f"engine-{target.__name__}", daemon=True)
            for target in targets
        ]
        for thread in self._threads:
            thread.start()
        if heartbeat_seconds:
            threading.Thread(
                target=self._watch, args=(heartbeat_seconds,), name="engine-watch", daemon=True
            ).start()
        self._outbox.put(start)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._child.pid

    @property
    def is_warm(self) -> bool:
        """Whether `models` would return at once."""
        return self._models is not None and not self._ended()

    @property
    def is_up(self) -> bool:
        """Whether the child is warm and alive."""
        return self.is_warm and self._up

    @property
    def running(self) -> frozenset[str]:
        """Ids of the requests that the present step computes, or the last step of a child that is gone."""
        return frozenset(self._running)

    def models(self) -> tuple[api.ModelInfo, ...]:
        """The served chains; blocks until the engine is warm.

        Raises:
          ValueError: the factory refused its arguments; the message is its own.
          EngineDied: the child ended before it was warm.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._models is not None or self._ended())
            if self._invalid is not None:
                raise ValueError(self._invalid)
            if self._closed:
                raise api.EngineDied("the engine was closed; build another one")
            if self._models is None or self._died is not None:
                raise api.EngineDied(self._died)
            return self._models

    def take_news(self) -> bool:
        """See `Engine`; of a child that is shared."""
        has_news, self._has_news = self._has_news, False
        return has_news

    def submit(self, request: api.Request) -> None:
        """Hands a request to the child; never blocks."""
        self._outbox.put(wire.pack(wire.Submit(request)))

    def cancel(self, request_id: str) -> None:
        """Asks the child to end a request; never blocks."""
        self._outbox.put(wire.pack(wire.Cancel(request_id)))

    def poll(self, timeout: float) -> list[api.Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the child is gone, with its exit code and the last line of its stderr.
        """
        outputs: list[api.Output] = []
        with contextlib.suppress(queue.Empty):
            outputs += self._steps.get(timeout=0.0 if self._ended() else timeout)
            while not self._steps.empty():
                outputs += self._steps.get_nowait()
        if not outputs and self._died is not None and not self._closed:
            raise api.EngineDied(self._died)
        return outputs

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """Has the child serve exactly these chains, and waits until it does.

        Raises:
          UnknownChain, ValueError: the engine refused; the message is its own.
          EngineDied: the child is gone, or was closed meanwhile.
        """
        self.models()
        with self._changed:
            number = next(self._numbers)
            self._outbox.put(
                wire.pack(wire.Serve(number, tuple(models), None if base is None else tuple(base)))
            )
            self._changed.wait_for(lambda: number in self._served or self._ended())
            if number not in self._served:
                raise api.EngineDied(self._died or "the engine was closed; build another one")
            answer = self._served.pop(number)
        if answer.refused:
            raise wire.ERRORS.get(answer.refused, RuntimeError)(answer.message)
        return answer.models

    def stats(self) -> api.EngineStats:
        """The counters that came last."""
        packed = self._packed_stats
        found, stats = self._stats
        if found is not packed:
            try:
                stats = wire.unpack_stats(packed)
            except ValueError as error:
                self._reject(error)
            self._stats = packed, stats
        return stats

    def close(self) -> None:
        """Asks the child to end, and makes it end if it does not."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._steps.put(())
        self._outbox.put(wire.pack(wire.Close()))
        self._outbox.put(None)
        self._child.end(_CLOSE_SECONDS)
        for thread in self._threads:
            thread.join(1.0)
        self._child.close()

    def _ended(self) -> bool:
        return self._closed or self._died is not None

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._child.send(frame)
            except OSError:
                return  # The child is gone; the reader says so.

    def _read(self) -> None:
        while True:
            try:
                frame = wire.for_parent(self._child.receive())
            except (EOFError, OSError):
                break
            except ValueError as error:
                self._reject(error)
                break
            self._frames += 1
            if isinstance(frame, wire.Step):
                if frame.stats:
                    self._packed_stats = frame.stats
                if frame.outputs:
                    self._steps.put(frame.outputs)
                    self._notify()
            elif isinstance(frame, wire.Running):
                self._running = self._running.difference(frame.ended).union(frame.begun)
            elif isinstance(frame, wire.Up):
                self._up = frame.up
            elif not isinstance(frame, wire.Beat):
                self._take(frame)
        died = self._how_it_died()
        with self._changed:
            self._died = died
            self._changed.notify_all()
        self._steps.put(())
        self._notify()

    def _reject(self, error: ValueError) -> None:
        """Ends a child that speaks another language: nothing it says can be used."""
        self._told = str(error)
        self._child.kill()

    def _take(self, frame: wire.Models | wire.Served | wire.Invalid | wire.Died) -> None:
        """What somebody may be waiting for."""
        if isinstance(frame, wire.Models | wire.Served):
            frame = msgspec.structs.replace(frame, models=tuple(map(self._localize, frame.models)))
        with self._changed:
            if isinstance(frame, wire.Models):
                self._has_news = self._models is not None
                self._models = frame.models
            elif isinstance(frame, wire.Served):
                self._served[frame.number] = frame
                if not frame.refused:
                    self._models = frame.models
            elif isinstance(frame, wire.Invalid):
                self._invalid = self._told = frame.message
            else:
                self._told = frame.message
            self._changed.notify_all()

    def _watch(self, seconds: float) -> None:
        """Kills a child that sends nothing for so long: it is frozen, or its main thread is stuck."""
        silent, frames, looked = 0.0, -1, time.monotonic()
        while not self._ended():
            time.sleep(min(0.25, seconds / 8))
            now = time.monotonic()
            # No more than a second counts: this process may have been paused too, or the machine slept.
            passed, looked = min(now - looked, 1.0), now
            if frames != self._frames or not self._child.is_there:
                frames, silent = self._frames, 0.0
                continue
            silent += passed / _BUSY_FACTOR if self._child.wants_to_run else passed
            if silent > seconds and not self._ended():
                self._told = f"it was frozen: no sign of life for {seconds:g} seconds"
                self._child.kill()
                return

    def _how_it_died(self) -> str:
        """What ended it, then what it said last."""
        how, words = self._child.how_it_ended()
        words = self._told.strip() or words
        return f"{how}; it said: {words}" if words else how
