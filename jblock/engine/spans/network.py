"""A home and agents on different hosts: a gRPC stream from each agent to the home, over mutual TLS, which
sees to it that what arrives is what was sent.

Rows come in pieces behind the message that describes them, and are computed on once all of them are there.
The receiver says now and then how many bytes it has taken; a sender has at most a window of others on their
way, and ends the stream if that stays full.
"""

import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from jblock.engine.graph.span_placement import HOME
from jblock.engine.spans.links import Links, QueuedLink, body_of, decoded, encoded, new_rows
from jblock.engine.spans.messages import Message, Rows
from jblock.hosts import streams
from jblock.hosts.credentials import from_files
from jblock.parallel.placement import Placement

_SERVICE = "jblock.rows.1"
_HELLO = struct.Struct("!I")
# Before each frame: bytes of the message in it, and of all its rows; or one of these, and how many bytes of
# rows.
_HEADER = struct.Struct("!IQ")
_TAKEN, _PIECE = 0, 2**32 - 1
_PIECE_BYTES = 2**20
_WINDOW_BYTES = 2**26
_TELL_BYTES = _WINDOW_BYTES // 4
_PATIENCE_SECONDS, _RETRY_SECONDS = 10.0, 0.2


class NetworkPort(Links):
    """A `Port` over them. Only the home and each agent are joined."""

    def __init__(
        self,
        agent: int,
        placement: Placement,
        *,
        session: str,
        home: str,
        listen: str,
        files: Mapping[str, str],
    ):
        """The port of an agent whose devices are those of the placement.

        Args:
          agent: whose.
          placement: see above.
          session: names the agents that belong together; others are left.
          home: "host:port" where the home's port listens.
          listen: where this one does if it is the home.
          files: see `credentials.from_files`.

        Raises:
          ValueError: the credentials cannot be used.
          OSError: a file cannot be read.
        """
        super().__init__(agent, placement)
        self._home, self._listen = home, listen
        self._session = session.encode()
        self._credentials = from_files(files)
        self._server: streams.StreamServer | None = None

    def start(self) -> Callable[[], None]:
        """See `Links`.

        Raises:
          ValueError: the address cannot be listened on.
        """
        if self.agent != HOME:
            return self._connect
        self._server = streams.StreamServer(self._listen, {_SERVICE: self._join}, self._credentials)
        return lambda: None

    def close(self) -> None:
        """See `Port`."""
        super().close()
        if self._server is not None:
            self._server.close()

    def _connect(self) -> None:
        while not self.closing.is_set():
            stream = streams.connect(self._home, _SERVICE, self._credentials)
            try:
                stream.send(_HELLO.pack(self.agent) + self._session)
                stream.receive()
            except streams.StreamEnded as error:
                logging.log_every_n_seconds(
                    logging.INFO,
                    "agent %d: no home at %s yet: %s",
                    10,
                    self.agent,
                    self._home,
                    error,
                )
            else:
                self.serve(HOME, _NetworkLink(stream))
            stream.close()
            self.closing.wait(_RETRY_SECONDS)

    def _join(self, stream: streams.Stream) -> None:
        """One agent's connection."""
        try:
            hello = stream.receive()
            if len(hello) < _HELLO.size or hello[_HELLO.size :] != self._session:
                raise ValueError("it belongs to other agents")
            (peer,) = _HELLO.unpack_from(hello)
            stream.send(b"")
        except (streams.StreamEnded, ValueError) as error:
            logging.warning("an agent is left: %s", error)
        else:
            self.serve(peer, _NetworkLink(stream))


class _NetworkLink(QueuedLink):
    """A `Link` over a stream."""

    def __init__(self, stream: streams.Stream):
        self._stream = stream
        self._changed = threading.Condition()
        self._on_their_way = self._taken = 0
        self._closed = False
        super().__init__()

    def next(self) -> tuple[Message, Any]:
        """See `Link`."""
        length, row_bytes, rest = self._frame()
        message = decoded(rest[:length], row_bytes)
        if not isinstance(message, Rows):
            return message, None
        rows, body = new_rows(message)
        piece = rest[length:]
        while True:
            if not len(piece) or len(piece) > len(body):
                raise ValueError(f"{len(piece)} bytes of rows where {len(body)} are to come")
            body[: len(piece)] = piece
            body = body[len(piece) :]
            if not len(body):
                break
            length, _, piece = self._frame()
            if length != _PIECE:
                raise ValueError("a message between the pieces of another one")
        self._taken += row_bytes
        if self._taken >= _TELL_BYTES:
            self._stream.send_now(_HEADER.pack(_TAKEN, self._taken))
            self._taken = 0
        return message, rows

    def _frame(self) -> tuple[int, int, memoryview]:
        """The next frame that is not about what the other side has taken: its header, and what is in it."""
        while True:
            frame = self._stream.receive()
            if len(frame) < _HEADER.size:
                raise ValueError(f"a frame of {len(frame)} bytes")
            length, row_bytes = _HEADER.unpack_from(frame)
            if length != _TAKEN:
                return length, row_bytes, memoryview(frame)[_HEADER.size :]
            with self._changed:
                self._on_their_way -= row_bytes
                self._changed.notify()

    def close(self) -> None:
        """See `Link`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        super().close()
        self._stream.close()

    def _send(self, message: Message, rows: Any) -> None:
        data, body = encoded(message), body_of(message, rows)
        if len(body):
            self._wait_for_room(len(body))
        head = _HEADER.pack(len(data), len(body)) + data
        self._stream.send(b"".join((head, body[:_PIECE_BYTES])))
        for at in range(_PIECE_BYTES, len(body), _PIECE_BYTES):
            piece = body[at : at + _PIECE_BYTES]
            self._stream.send(b"".join((_HEADER.pack(_PIECE, len(piece)), piece)))

    def _wait_for_room(self, size: int) -> None:
        """Waits until so many bytes may be on their way.

        Raises:
          StreamEnded: there was none in time, or the link was closed.
        """

        def is_free() -> bool:
            fits = self._on_their_way + size <= _WINDOW_BYTES
            # Of fewer the other side need not have told yet that it has them.
            return self._closed or fits or self._on_their_way < _TELL_BYTES

        with self._changed:
            if not self._changed.wait_for(is_free, _PATIENCE_SECONDS) or self._closed:
                raise streams.StreamEnded("rows are not taken")
            self._on_their_way += size
