"""One engine for several front ends, which come and go: each speaks to it over a Unix socket, in the frames
of a child process. What a front end had open is cancelled when it is gone.
"""

import contextlib
import dataclasses
import itertools
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
from absl import logging

from jblock.engine import api
from jblock.engine.process import wire
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.server import change

# Front ends at a time, frames that wait for one that does not read, and bytes of one that it sends.
_MAX_FRONT_ENDS, _MAX_WAITING, _MAX_FRAME = 64, 10_000, 64 * 2**20
# Seconds between looks at an engine that brings nothing: how late gauges and a stop may be noticed.
_POLL_SECONDS = 0.1
# Seconds that the last frames to a front end may take when all ends.
_LAST_WORDS_SECONDS = 2.0
_PEER = struct.Struct("3i")  # Process, user and group of who connected.


def remote_engine(path: str) -> ProcessEngine:
    """The shared engine at a socket, for one front end; to close it is to leave it.

    Raises:
      OSError: nobody listens there.
    """
    return ProcessEngine("", begin=lambda: SharedChild(path))


class SharedChild:
    """A `Child` that others use too."""

    is_there = True
    wants_to_run = False
    pid = 0

    def __init__(self, path: str):
        """Connects.

        Raises:
          OSError: nobody listens there.
        """
        self._path = path
        self._over = threading.Event()
        with socket.socket(socket.AF_UNIX) as plain:
            try:
                plain.connect(path)
            except OSError as error:
                raise OSError(
                    f"engine_address: no engine listens at {path} ({error.strerror}); start one with "
                    "--share_engine"
                ) from error
            self._connection = Connection(plain.detach())

    def send(self, frame: bytes) -> None:
        """See `Child`."""
        self._connection.send_bytes(frame)

    def receive(self) -> bytes:
        """See `Child`."""
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            self._over.set()
            raise

    def kill(self) -> None:
        """Leaves at once; it lives on for the others."""
        with contextlib.suppress(OSError):
            shut(self._connection)

    def end(self, seconds: float) -> None:
        """Leaves, once it was told so."""
        self._over.wait(min(seconds, _LAST_WORDS_SECONDS))
        self.kill()

    def close(self) -> None:
        """See `Child`."""
        self._connection.close()

    def how_it_ended(self) -> tuple[str, str]:
        """See `Child`."""
        return f"the engine at {self._path} is gone", ""


class SharedEngine:
    """Shares an engine out. `run` does it, in one thread; each front end has two more."""

    def __init__(self, engine: api.Engine, path: str):
        """Listens at once; front ends that come before the engine is warm wait.

        Args:
          engine: taken over; `run` closes it.
          path: of the socket, which only our user may connect to.

        Raises:
          OSError: somebody listens there, or one cannot.
        """
        self._engine = engine
        self._socket = _listening(path)
        self._path = path
        self._lock = threading.Lock()
        self._front_ends: dict[int, _FrontEnd] = {}
        self._numbers = itertools.count(1)
        self._warm = False
        self._news: tuple[bool, api.EngineStats] | None = None  # What all were told last.
        threading.Thread(target=self._accept, name="engine-accept", daemon=True).start()

    @property
    def num_open(self) -> int:
        """Requests of all front ends."""
        with self._lock:
            return sum(len(one.open) for one in self._front_ends.values())

    def run(self, stop: threading.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Shares the engine until it is told to stop, or the engine is gone for good; then closes it.

        Args:
          stop: ends it.
          on_ready: called once the engine is warm.

        Raises:
          ValueError: the engine refused its configuration.
          EngineDied: it ended, and could not be replaced.
        """
        try:
            models = self._engine.models()
            with self._lock:
                self._warm = True
            self._tell(wire.Models(tuple(models)))
            on_ready()
            while not stop.is_set():
                self._route(self._engine.poll(_POLL_SECONDS))
                self._tell_news()
        except ValueError as error:
            self._tell(wire.Invalid(str(error)))
            raise
        except api.EngineDied as error:
            self._tell(wire.Died(str(error)))
            raise
        finally:
            self._close()

    def _close(self) -> None:
        shut(self._socket)
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with self._lock:
            left = list(self._front_ends.values())
        for one in left:
            one.outbox.put(None)
        for one in left:
            one.writer.join(_LAST_WORDS_SECONDS)
            one.leave()
        self._engine.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return  # It was closed.
            user = _PEER.unpack(
                plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )[1]
            with self._lock:
                welcome = user == os.getuid() and len(self._front_ends) < _MAX_FRONT_ENDS
                if welcome:
                    one = _FrontEnd(next(self._numbers), self, Connection(plain.detach()))
                    self._front_ends[one.number] = one
                    # Counters first, as from a child.
                    one.send(wire.Step((), wire.pack_stats(self._engine.stats())))
                    one.send(wire.Up(self._engine.is_up))
                    if self._warm:
                        one.send(wire.Models(tuple(self._engine.models())))
            if welcome:
                one.begin()
                logging.info("front end %d came", one.number)
            else:
                plain.close()
                logging.warning("a front end of user %d was sent away", user)

    def _route(self, outputs: list[api.Output]) -> None:
        """Gives each front end what is its own."""
        shares: dict[int, list[api.Output]] = {}
        for output in outputs:
            number, _, request_id = output.request_id.partition(":")
            own = msgspec.structs.replace(output, request_id=request_id)
            shares.setdefault(int(number), []).append(own)
        with self._lock:
            found = [(self._front_ends.get(number), share) for number, share in shares.items()]
        for one, share in found:
            if one is not None:
                one.open.difference_update(o.request_id for o in share if o.finish_reason)
                one.send(wire.Step(tuple(share)))

    def _tell_news(self) -> None:
        news = self._engine.is_up, self._engine.stats()
        if news != self._news:
            self._news = news
            self._tell(wire.Up(news[0]))
            self._tell(wire.Step((), wire.pack_stats(news[1])))

    def _tell(self, frame: wire.ToParent) -> None:
        """Tells all front ends."""
        with self._lock:
            found = list(self._front_ends.values())
        for one in found:
            one.send(frame)

    def take(self, one: "_FrontEnd", frame: wire.ToChild) -> None:
        """What a front end says."""
        if isinstance(frame, wire.Submit):
            request_id = frame.request.request_id
            one.open.add(request_id)
            own = f"{one.number}:{request_id}"
            self._engine.submit(dataclasses.replace(frame.request, request_id=own))
        elif isinstance(frame, wire.Cancel):
            self._engine.cancel(f"{one.number}:{frame.request_id}")
        elif isinstance(frame, wire.Serve):
            threading.Thread(
                target=self._change, args=(one, frame), name="engine-serve", daemon=True
            ).start()

    def _change(self, one: "_FrontEnd", frame: wire.Serve) -> None:
        """Serves other chains for one front end, and has all know them."""
        change(one, self._engine, frame)
        with contextlib.suppress(api.EngineDied):
            self._tell(wire.Models(tuple(self._engine.models())))

    def gone(self, one: "_FrontEnd") -> None:
        """A front end is gone: what it had open is cancelled."""
        with self._lock:
            self._front_ends.pop(one.number, None)
        left = list(one.open)
        for request_id in left:
            self._engine.cancel(f"{one.number}:{request_id}")
        logging.info("front end %d left; %d requests are cancelled", one.number, len(left))


class _FrontEnd:
    """A front end that is connected.

    Attributes:
      number: tells its requests from those of others.
      open: ids of its requests that the engine has not ended.
      outbox: frames for it; None is the last.
      writer: the thread that sends them.
    """

    def __init__(self, number: int, shared: SharedEngine, connection: Connection):
        self.number = number
        self.open: set[str] = set()
        self.outbox: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._shared, self._connection = shared, connection
        name = f"front-end-{number}"
        self.writer = threading.Thread(target=self._write, name=f"{name}-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"{name}-reader", daemon=True)

    def begin(self) -> None:
        """Begins to listen to it."""
        self.writer.start()
        self._reader.start()

    def send(self, frame: wire.ToParent) -> None:
        """Sends a frame, some time; one that does not read is left."""
        try:
            self.outbox.put_nowait(wire.pack(frame))
        except queue.Full:
            self.leave()

    def leave(self) -> None:
        """Ends the connection; the reader sees it."""
        with contextlib.suppress(OSError):
            shut(self._connection)

    def _write(self) -> None:
        while (data := self.outbox.get()) is not None:
            try:
                self._connection.send_bytes(data)
            except OSError:
                return

    def _read(self) -> None:
        try:
            while True:
                frame = wire.for_child(self._connection.recv_bytes(_MAX_FRAME))
                if isinstance(frame, wire.Close):
                    break
                self._shared.take(self, frame)
        except (EOFError, OSError):
            pass
        except ValueError as error:
            logging.error("front end %d: %s", self.number, error)
        self.leave()
        self._shared.gone(self)
        with contextlib.suppress(queue.Full):
            self.outbox.put_nowait(None)
        self.writer.join(_LAST_WORDS_SECONDS)
        self._connection.close()


def shut(connection: Connection | socket.socket) -> None:
    """Ends a connection for the threads that wait at it too.

    Raises:
      OSError: it has ended.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as one:
        one.shutdown(socket.SHUT_RDWR)


def _listening(path: str) -> socket.socket:
    """A socket that only our user may connect to; it takes the place of one that nobody listens at.

    Raises:
      OSError: somebody does, or one cannot listen there.
    """
    with socket.socket(socket.AF_UNIX) as there:
        if there.connect_ex(path) == 0:
            raise FileExistsError(f"share_engine: an engine listens at {path}; give another path")
    made = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        if os.path.exists(path):
            os.unlink(path)
    before = os.umask(0o177)
    try:
        made.bind(path)
    except OSError as error:
        made.close()
        raise OSError(f"share_engine: cannot listen at {path} ({error.strerror})") from error
    finally:
        os.umask(before)
    made.listen(_MAX_FRONT_ENDS)
    return made


def drained(shared: SharedEngine, seconds: float, hurry: threading.Event) -> None:
    """Waits for open requests, up to so long, or until it is to hurry."""
    end = time.monotonic() + seconds
    while shared.num_open and time.monotonic() < end and not hurry.wait(_POLL_SECONDS):
        pass
