"""What joins agents in different processes: a link to each, over which messages and rows come in order.

A link that ends, or is made, says `Gone`: whoever is on the other side knows nothing of before.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import jax
import msgspec
import numpy as np
from absl import logging

from jblock.engine.programs.row_moves import size_for
from jblock.engine.spans.messages import Gone, Message, Rows
from jblock.engine.spans.port import Receive
from jblock.parallel.placement import Placement

MOST_WAITING = 10_000
"""Messages; a peer that takes nothing for so long is not there."""

_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


class Link(Protocol):
    """This end of a connection."""

    def put(self, message: Message, rows: Any) -> None:
        """Has a message written; returns at once."""
        ...

    def next(self) -> tuple[Message, Any]:
        """The next message, and its rows on the host: float32 [at least as many as it says, width].

        Raises:
          OSError: the connection ended.
          ValueError: what came is no message.
        """
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class QueuedLink:
    """Base of a `Link`: what cannot be written without waiting, for the device or for who reads, is written
    on a thread of its own."""

    def __init__(self) -> None:
        """Starts to write; what `_send` uses must be there."""
        self._waiting: queue.SimpleQueue[tuple[Message, Any] | None] = queue.SimpleQueue()
        self._unwritten, self._lock = 0, threading.Lock()
        threading.Thread(target=self._write, name="spans-write", daemon=True).start()

    def put(self, message: Message, rows: Any) -> None:
        """See `Link`."""
        with self._lock:
            is_first = not self._unwritten and _is_there(rows)
            try:
                if is_first and self._send_at_once(message, rows):
                    return
            except OSError:
                self.close()
                return
            self._unwritten += 1
        if self._waiting.qsize() > MOST_WAITING:
            self.close()
        else:
            self._waiting.put((message, rows))

    def close(self) -> None:
        """See `Link`."""
        self._waiting.put(None)

    def _send(self, message: Message, rows: Any) -> None:
        """Writes a message.

        Raises:
          OSError: the connection ended.
        """
        raise NotImplementedError

    def _send_at_once(self, message: Message, rows: Any) -> bool:
        """Writes a message if that takes no waiting, and says whether it did.

        Raises:
          OSError: the connection ended.
        """
        return False

    def _write(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                self._send(*item)
                with self._lock:
                    self._unwritten -= 1
        except OSError:
            self.close()


class Links:
    """The links of one agent; base of a `Port` over them."""

    def __init__(self, agent: int, placement: Placement):
        """The links of an agent whose devices are those of the placement."""
        self.agent = agent
        self.closing = threading.Event()
        self._placement = placement
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()
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
        threading.Thread(target=self.start(), name="spans-connect", daemon=True).start()

    def start(self) -> Callable[[], None]:
        """Listens for others if this is the home's; what connects with them, on a thread of its own."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Port`."""
        self.closing.set()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

    def serve(self, peer: int, link: Link) -> None:
        """Takes what comes over a link to an agent until it ends. An older one to it ends now."""
        with self._lock:
            before, self._links[peer] = self._links.get(peer), link
        if before is not None:
            before.close()
        self._receive(peer, Gone(), None)
        try:
            while not self.closing.is_set():
                message, rows = link.next()
                if rows is not None and self._placement.devices:
                    rows = self._placement.put(rows, "rows")
                self._receive(peer, message, rows)
        except (OSError, ValueError) as error:
            logging.info("agent %d: the connection to agent %d ended: %s", self.agent, peer, error)
        finally:
            link.close()
            with self._lock:
                current = self._links.get(peer) is link
                if current:
                    del self._links[peer]
            if current:
                self._receive(peer, Gone(), None)


def _is_there(rows: Any) -> bool:
    """Whether rows, of a device or of the host, were computed."""
    is_ready = getattr(rows, "is_ready", None)
    return is_ready is None or is_ready()


def encoded(message: Message) -> bytes:
    """A message as bytes."""
    return _ENCODER.encode(message)


def decoded(data: bytes | bytearray | memoryview, row_bytes: int) -> Message:
    """The message; so many bytes of rows come behind it.

    Raises:
      ValueError: it is none, or has rows of another size.
    """
    try:
        message: Message = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{len(data)} bytes are no message: {error}") from error
    if not isinstance(message, Rows):
        if row_bytes:
            raise ValueError("rows behind a message without any")
        return message
    count, width = message.count, message.width
    if not (0 < count <= 2**15 and 0 < width <= 2**20 and row_bytes == 4 * count * width):
        raise ValueError(f"{row_bytes} bytes for {count} rows of width {width}")
    return message


def body_of(message: Message, rows: Any) -> memoryview:
    """The rows of a message as bytes; waits for the device."""
    if not isinstance(message, Rows):
        return memoryview(b"")
    return np.ascontiguousarray(np.asarray(rows)[: message.count]).data.cast("B")


def new_rows(message: Rows) -> tuple[np.ndarray, memoryview]:
    """An array for the rows of a message, with what fills them up, and the bytes that are to come into it. A
    new one for each: the device may go on reading it."""
    rows = np.empty((size_for(message.count), message.width), np.float32)
    rows[message.count :] = 0
    return rows, rows[: message.count].data.cast("B")
