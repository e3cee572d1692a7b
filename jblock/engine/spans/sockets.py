"""A home and agents in processes of one machine: a Unix socket between the home and each agent.

Sockets lie in a folder that only the user of the processes can enter. A connection that ends, or is made,
says `Gone`: whoever is on the other side knows nothing of before. Agents connect, again and again, as long as
they live.
"""

import contextlib
import os
import queue
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from absl import logging

from jblock.engine.graph.span_placement import HOME
from jblock.engine.programs.row_moves import size_for
from jblock.engine.spans.messages import Gone, Message, Rows
from jblock.engine.spans.port import Receive
from jblock.parallel.placement import Placement

_HEADER = struct.Struct("!IQ")  # bytes of the message, and of the rows behind it
_HELLO = struct.Struct("!I")
_MOST_BYTES = 64 * 2**20  # of a message: the tokens of the longest sequence there could be
_MOST_WAITING = 10_000  # messages; a peer that reads nothing for so long is not there
_RETRY_SECONDS, _LOOK_SECONDS = 0.05, 1.0
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


class SocketPort:
    """A `Port` over them. Only the home and each agent are joined: agents have nothing to tell each other."""

    def __init__(self, agent: int, folder: Path, placement: Placement):
        """The port of an agent whose devices are those of the placement. The folder must exist.

        Raises:
          ValueError: others may enter the folder.
        """
        if folder.stat().st_mode & 0o077:
            raise ValueError(f"folder {str(folder)!r} of sockets is open to others: chmod 700 it")
        self.agent = agent
        self._path = str(folder / "home")
        self._placement = placement
        self._links: dict[int, _Link] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._receive: Receive = lambda sender, message, rows: None

    def send(self, agent: int, message: Message, rows: jax.Array | None = None) -> None:
        """See `Port`. What is for an agent that is not connected is lost: it will be `Gone`."""
        with self._lock:
            link = self._links.get(agent)
        if link is not None:
            link.put(message, rows)

    def listen(self, receive: Receive) -> None:
        """See `Port`."""
        self._receive = receive
        run = self._connect
        if self.agent == HOME:
            server = self._bind()
            run = lambda: self._accept(server)
        threading.Thread(target=run, name="spans-connect", daemon=True).start()

    def close(self) -> None:
        """See `Port`."""
        self._closing.set()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

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
            while not self._closing.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                threading.Thread(
                    target=self._join, args=(connection,), name="spans-read", daemon=True
                ).start()

    def _connect(self) -> None:
        while not self._closing.is_set():
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._path)
                connection.sendall(_HELLO.pack(self.agent))
            except OSError:
                connection.close()
            else:
                self._serve(HOME, connection)
            self._closing.wait(_RETRY_SECONDS)

    def _join(self, connection: socket.socket) -> None:
        hello = bytearray(_HELLO.size)
        try:
            _read(connection, memoryview(hello))
        except OSError:
            connection.close()
            return
        self._serve(_HELLO.unpack(hello)[0], connection)

    def _serve(self, peer: int, connection: socket.socket) -> None:
        """Reads until the connection ends."""
        connection.settimeout(None)
        link = _Link(connection)
        with self._lock:
            before, self._links[peer] = self._links.get(peer), link
        if before is not None:
            before.close()
        self._receive(peer, Gone(), None)
        try:
            while True:
                message, rows = self._next(connection)
                self._receive(peer, message, rows)
        except (OSError, msgspec.DecodeError, ValueError) as error:
            logging.info("agent %d: the connection to agent %d ended: %s", self.agent, peer, error)
        finally:
            link.close()
            with self._lock:
                current = self._links.get(peer) is link
                if current:
                    del self._links[peer]
            if current:
                self._receive(peer, Gone(), None)

    def _next(self, connection: socket.socket) -> tuple[Message, Any]:
        """The next message and its rows.

        Raises:
          OSError: the connection ended.
          ValueError, msgspec.DecodeError: what came is no message.
        """
        header = bytearray(_HEADER.size)
        _read(connection, memoryview(header))
        length, row_bytes = _HEADER.unpack(header)
        if length > _MOST_BYTES:
            raise ValueError(f"a message of {length} bytes")
        data = bytearray(length)
        _read(connection, memoryview(data))
        message: Message = _DECODER.decode(data)
        if not isinstance(message, Rows):
            if row_bytes:
                raise ValueError("rows behind a message without any")
            return message, None
        count, width = message.count, message.width
        if not (0 < count <= 2**15 and 0 < width <= 2**20 and row_bytes == 4 * count * width):
            raise ValueError(f"{row_bytes} bytes for {count} rows of width {width}")
        # A new array for each: the device may go on reading it.
        rows = np.zeros((size_for(count), width), np.float32)
        _read(connection, rows[:count].data.cast("B"))
        return message, self._placement.put(rows, "rows") if self._placement.devices else rows


class _Link:
    """Writes to a connection, on a thread that may wait for the device and for who reads."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._waiting: queue.SimpleQueue[tuple[Message, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="spans-write", daemon=True).start()

    def put(self, message: Message, rows: Any) -> None:
        """Has a message written."""
        if self._waiting.qsize() > _MOST_WAITING:
            self.close()
        else:
            self._waiting.put((message, rows))

    def close(self) -> None:
        """Ends the connection."""
        self._waiting.put(None)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            message, rows = item
            data, body = _ENCODER.encode(message), b""
            if isinstance(message, Rows):
                body = np.ascontiguousarray(np.asarray(rows)[: message.count]).tobytes()
            try:
                self._connection.sendall(_HEADER.pack(len(data), len(body)) + data + body)
            except OSError:
                return


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
