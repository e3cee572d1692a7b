"""A home and agents in processes of one machine: a Unix socket between the home and each agent, and memory
that both have, one piece in each direction. A message goes through the socket, its rows through the memory,
or behind the message where there is no room.

Sockets lie in a folder that only the user of the processes can enter. Agents connect, again and again, as
long as they live.
"""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jblock.engine.graph.span_placement import HOME
from jblock.engine.spans.links import Links, QueuedLink, body_of, decoded, encoded, new_rows
from jblock.engine.spans.messages import Message, Rows
from jblock.engine.spans.shared_memory import Ring, new_file
from jblock.parallel.placement import Placement

# Bytes of the message, and of its rows; whether those lie in the memory, and where.
_HEADER = struct.Struct("!IQ?Q")
_HELLO, _MEMORY = struct.Struct("!I"), b"m"
_MOST_BYTES = 64 * 2**20  # of a message: the tokens of the longest sequence there could be
_AT_A_TIME, _AT_ONCE = 2**16, 2**15  # bytes
_RETRY_SECONDS, _LOOK_SECONDS = 0.05, 1.0


class SocketPort(Links):
    """A `Port` over them. Only the home and each agent are joined: agents have nothing to tell each other."""

    def __init__(self, agent: int, folder: Path, placement: Placement):
        """The port of an agent whose devices are those of the placement. The folder must exist.

        Raises:
          ValueError: others may enter the folder.
        """
        if folder.stat().st_mode & 0o077:
            raise ValueError(f"folder {str(folder)!r} of sockets is open to others: chmod 700 it")
        super().__init__(agent, placement)
        self._path = str(folder / "home")

    def start(self) -> Callable[[], None]:
        """See `Links`."""
        if self.agent != HOME:
            return self._connect
        server = self._bind()
        return lambda: self._accept(server)

    def _bind(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # of a home that was here before
        server = socket.socket(socket.AF_UNIX)
        try:
            server.bind(self._path)
            server.listen()
        except OSError:
            server.close()
            raise
        return server

    def _accept(self, server: socket.socket) -> None:
        with server:
            server.settimeout(_LOOK_SECONDS)
            while not self.closing.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                threading.Thread(
                    target=self._join, args=(connection,), name="spans-read", daemon=True
                ).start()

    def _connect(self) -> None:
        while not self.closing.is_set():
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._path)
                connection.sendall(_HELLO.pack(self.agent))
                link = _SocketLink(connection)
            except OSError:
                connection.close()
            else:
                self.serve(HOME, link)
            self.closing.wait(_RETRY_SECONDS)

    def _join(self, connection: socket.socket) -> None:
        hello = bytearray(_HELLO.size)
        connection.settimeout(None)
        try:
            _read(connection, memoryview(hello))
            link = _SocketLink(connection)
        except OSError:
            connection.close()
            return
        self.serve(_HELLO.unpack(hello)[0], link)


class _SocketLink(QueuedLink):
    """A `Link` over a connection, rows through shared memory where there is room in it."""

    def __init__(self, connection: socket.socket):
        """A link that has sent its memory.

        Raises:
          OSError: the connection ended, or there is no memory.
        """
        self._connection = connection
        file = new_file()
        try:
            socket.send_fds(connection, [_MEMORY], [file])
        except OSError:
            os.close(file)
            raise
        self._outgoing = Ring(file)
        self._number, self._writable = connection.fileno(), select.poll()
        self._writable.register(self._number, select.POLLOUT)
        self._incoming: Ring | None = None
        self._reader = _Reader(connection)
        super().__init__()

    def next(self) -> tuple[Message, Any]:
        """See `Link`."""
        if self._incoming is None:
            self._incoming = self._memory()
        header = self._reader.read(_HEADER.size)
        length, row_bytes, is_shared, position = _HEADER.unpack(header)
        if length > _MOST_BYTES:
            raise ValueError(f"a message of {length} bytes")
        data = self._reader.read(length)
        message = decoded(data, row_bytes)
        if not isinstance(message, Rows):
            return message, None
        rows, body = new_rows(message)
        if is_shared:
            self._incoming.take(position, body)
        else:
            self._reader.read_into(body)
        return message, rows

    def _memory(self) -> Ring:
        """The other side's.

        Raises:
          OSError: the connection ended.
          ValueError: something else came.
        """
        _, files, _, _ = socket.recv_fds(self._connection, len(_MEMORY), 1)
        if not files:
            raise ValueError("no memory came first")
        return Ring(files[0])

    def close(self) -> None:
        """See `Link`."""
        super().close()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, message: Message, rows: Any) -> None:
        data, body = encoded(message), body_of(message, rows)
        position = self._outgoing.put(body) if body else None
        self._connection.sendall(_header(data, body, position))
        if position is None:
            self._connection.sendall(body)

    def _send_at_once(self, message: Message, rows: Any) -> bool:
        data = encoded(message)
        # A Unix socket that can be written to has room for as much.
        if len(data) > _AT_ONCE or self._writable.poll(0) != [(self._number, select.POLLOUT)]:
            return False
        body = body_of(message, rows)
        position = self._outgoing.put(body) if body else None
        if body and position is None:
            return False
        self._connection.sendall(_header(data, body, position))
        return True


def _header(data: bytes, body: memoryview, position: int | None) -> bytes:
    """What precedes the rows of a message, with the message."""
    return _HEADER.pack(len(data), len(body), position is not None, position or 0) + data


class _Reader:
    """What comes over a connection, as much at a time as is there: a message is one call of the system."""

    def __init__(self, connection: socket.socket):
        """A reader that has read nothing."""
        self._connection = connection
        self._buffer = memoryview(bytearray(_AT_A_TIME))
        self._begin = self._end = 0

    def read(self, size: int) -> memoryview:
        """The next bytes, until the next call.

        Raises:
          OSError: the connection ended.
        """
        if size > _AT_A_TIME:
            into = memoryview(bytearray(size))
            self.read_into(into)
            return into
        if self._begin + size > _AT_A_TIME:
            left = self._end - self._begin
            self._buffer[:left] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, left
        while self._end - self._begin < size:
            count = self._connection.recv_into(self._buffer[self._end :])
            if not count:
                raise ConnectionError("closed")
            self._end += count
        return self._taken(size)

    def read_into(self, into: memoryview) -> None:
        """Fills `into`.

        Raises:
          OSError: the connection ended.
        """
        there = min(len(into), self._end - self._begin)
        into[:there] = self._taken(there)
        _read(self._connection, into[there:])

    def _taken(self, size: int) -> memoryview:
        taken = self._buffer[self._begin : self._begin + size]
        self._begin += size
        if self._begin == self._end:
            self._begin = self._end = 0
        return taken


def _read(connection: socket.socket, into: memoryview) -> None:
    """Fills `into`.

    Raises:
      OSError: the connection ended.
    """
    while into:
        count = connection.recv_into(into)
        if not count:
            raise ConnectionError("closed")
        into = into[count:]
