"""An agent on a host of its own: starts the process with the engine for a server that it knows, and stands
between the two.

It belongs to one server at a time, from when that connects until the connection ends; then its process is
ended, so nothing of it can answer for what was given away since.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from absl import logging

from jblock.engine.process import wire
from jblock.engine.process.child import LocalChild
from jblock.engine.process.client import FACTORY
from jblock.hosts.addresses import rows_address
from jblock.hosts.credentials import from_files
from jblock.hosts.messages import SERVICE, Ended, Here, Said, pack
from jblock.hosts.streams import Stream, StreamEnded, StreamServer

_LOOK_SECONDS = 1.0
_END_SECONDS = 10.0
# Arguments that are a host's own: what lies in the folder of programs is run.
_OF_HOST = ("executable_cache", "profiler_port")
# How long the process of a server that is gone may keep the next one waiting.
_HANDOVER_SECONDS = 5.0


class Agent:
    """One of them; listens from its making on."""

    def __init__(
        self,
        listen: str,
        files: Mapping[str, str],
        own: Mapping[str, Any] | None = None,
        factories: Collection[str] = (FACTORY,),
    ):
        """An agent without a process.

        Args:
          listen: "host:port"; rows of other agents come to the port after it.
          files: see `credentials.from_files`.
          own: arguments of the engine that are this host's and no matter of a server: folders, ports.
          factories: that a server may ask for.

        Raises:
          ValueError: the address or the credentials cannot be used.
          OSError: a file cannot be read.
        """
        self._rows, self._files = rows_address(listen), dict(files)
        self._own, self._factories = dict(own or {}), factories
        self._busy = threading.Lock()
        self._server = StreamServer(listen, {SERVICE: self._join}, from_files(files))

    def close(self) -> None:
        """Ends the process, and listens no more."""
        self._server.close()
        with self._busy:  # Until it has ended.
            pass

    def _join(self, stream: Stream) -> None:
        """One server's connection."""
        if not self._busy.acquire(timeout=_HANDOVER_SECONDS):
            stream.send(
                pack(Ended("it works for another server; stop that, or give another agent"))
            )
            return
        try:
            _Work(stream).run(self._settled)
        except StreamEnded as error:
            logging.info("a server left: %s", error)
        finally:
            self._busy.release()

    def _settled(self, start: wire.Start) -> wire.Start:
        """What is started of what a server asks for.

        Raises:
          ValueError: it is nothing that an agent starts.
        """
        if start.factory not in self._factories:
            raise ValueError(f"factory: {start.factory!r} is none that an agent starts")
        asked = {n: value for n, value in start.kwargs.items() if n not in _OF_HOST}
        kwargs = {**asked, **self._own}
        if network := kwargs.get("span_network"):
            kwargs["span_network"] = {**network, "listen": self._rows, "files": self._files}
        return wire.Start(start.factory, kwargs, start.heartbeat)


class _Work:
    """A process, from a server's connection to its end."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._child = LocalChild()
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, name="agent-read", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="agent-tell", daemon=True)
        self._sending = threading.Lock()

    def run(self, settled: Callable[[wire.Start], wire.Start]) -> None:
        """Passes frames on until either side ends.

        Raises:
          StreamEnded: the server is gone.
        """
        try:
            self._say(Here(self._child.pid, True))
            if self._begin(settled):
                self._reader.start()
                self._teller.start()
                self._write()
                self._reader.join()  # It says how the process ended.
        finally:
            self._over.set()
            self._child.kill()
            self._child.end(_END_SECONDS)
            for thread in (self._reader, self._teller):
                if thread.is_alive():
                    thread.join(_END_SECONDS)
            self._child.close()

    def _begin(self, settled: Callable[[wire.Start], wire.Start]) -> bool:
        """Starts the engine; whether it may be started."""
        try:
            start = wire.for_child(self._stream.receive())
            if not isinstance(start, wire.Start):
                raise ValueError(f"the first frame is {type(start).__name__}, not Start")
            self._child.send(wire.pack(settled(start)))
            return True
        except ValueError as error:
            self._say(Said(wire.pack(wire.Invalid(str(error)))))
            return False

    def _write(self) -> None:
        """Passes on what the server says, until the process ends.

        Raises:
          StreamEnded: the server is gone.
        """
        while True:
            frame = self._stream.receive()
            try:
                self._child.send(frame)
            except OSError:
                return

    def _read(self) -> None:
        """Passes on what the process says, and at last how it ended."""
        with contextlib.suppress(StreamEnded):
            while (frame := self._frame()) is not None:
                self._say(Said(frame))
            self._say(Ended(*self._child.how_it_ended()))
            self._stream.finish()

    def _frame(self) -> bytes | None:
        try:
            return self._child.receive()
        except (EOFError, OSError):
            return None

    def _tell(self) -> None:
        """Says that it is there. A server that takes nothing is gone, and the process with it."""
        with contextlib.suppress(StreamEnded):
            while not self._over.wait(_LOOK_SECONDS):
                self._say(Here(self._child.pid, self._child.wants_to_run))

    def _say(self, message: Here | Said | Ended) -> None:
        with self._sending:
            self._stream.send(pack(message))
