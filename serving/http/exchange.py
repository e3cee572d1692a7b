"""One HTTP exchange: the body with a limit, the answer as JSON or as events, and a client that leaves."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import msgspec

from serving.http import events
from serving.http.connection import Connection
from serving.http.errors import Headers, HTTPError, undecodable

Scope = MutableMapping[str, Any]
Receive = Any
Send = Any
T = TypeVar("T")

# A prompt of 100,000 ids takes 0.7 MB; no request of use is near this.
MAX_BODY_BYTES = 8 * 2**20

# Seconds that a body may take.
BODY_SECONDS = 60.0
_DISCARD_SECONDS = 1.0
_PIECE_BYTES = 32 * 1024


class Left(Exception):
    """The client has gone."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The body of a request.

    Raises:
      HTTPError: 413, it is too long; 408, its end did not come.
      Left: the client has gone before its end.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _body(scope, receive)
    except TimeoutError as error:
        raise HTTPError(408, f"body: its end did not come in {BODY_SECONDS:g} s") from error


async def _body(scope: Scope, receive: Receive) -> bytes:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MAX_BODY_BYTES:
            await _discard(receive)
            raise _too_long()
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            parts.clear()
            await _discard(receive)
            raise _too_long()
        if not message.get("more_body", False):
            return b"".join(parts)


def decode(body: bytes, kind: type[T]) -> T:
    """The fields of a body.

    Raises:
      RequestError: it is no such object; the message names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise HTTPError(400, "body: is nested too deeply; send a flatter one") from error
        raise undecodable(error) from error


async def unless_left(work: Awaitable[T], receive: Receive) -> T:
    """What the work returns; it is cancelled at once when the client leaves.

    Raises:
      Left: the client has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Left
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


class Sender:
    """Sends the answer of one exchange.

    Attributes:
      started: the status has been sent, and cannot be another one any more.
      headers: what goes out with it besides.
    """

    def __init__(self, send: Send, connection: Connection | None = None):
        """`connection` is that of the exchange, if it is known."""
        self.started = False
        self.headers: Callable[[], Headers] = list
        self._send, self._connection = send, connection

    async def json(self, content: Any, status: int = 200, headers: Headers | None = None) -> None:
        """The whole answer; bytes are JSON already."""
        body = content if isinstance(content, bytes) else events.encode(content)
        await self._start(status, b"application/json", [*(headers or []), _length(body)])
        # In pieces: before each uvicorn waits until the client has taken what was sent before.
        for at in range(0, len(body), _PIECE_BYTES):
            piece = body[at : at + _PIECE_BYTES]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.end()

    async def events(self, body: bytes) -> None:
        """Events of a stream, as `serving.http.events` makes them; waits for a client that reads slowly."""
        if not self.started:
            await self._start(200, events.KIND, [(b"cache-control", b"no-cache")])
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    @property
    def ready(self) -> bool:
        """Whether `push` may be used."""
        return self.started and self._connection is not None and self._connection.writable

    def push(self, body: bytes) -> None:
        """As `events` for a stream that has begun, at once and without a task."""
        assert self._connection is not None
        self._connection.write_chunk(body)

    async def end(self) -> None:
        """The end of an answer."""
        await self._send({"type": "http.response.body", "body": b""})

    async def done(self) -> None:
        """The last event of a stream."""
        await self.events(events.DONE)
        await self.end()

    async def _start(self, status: int, kind: bytes, headers: Headers) -> None:
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind), *headers, *self.headers()],
            }
        )


def header(scope: Mapping[str, Any], name: bytes) -> list[str]:
    """The values of a header."""
    return [value.decode("latin-1") for n, value in scope["headers"] if n == name]


async def _discard(receive: Receive) -> None:
    """Reads on for a while: a client that still sends when it is answered may miss the answer."""
    left = 8 * MAX_BODY_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _length(body: bytes) -> tuple[bytes, bytes]:
    return (b"content-length", str(len(body)).encode())


def _too_long() -> HTTPError:
    return HTTPError(413, f"body: is longer than {MAX_BODY_BYTES} bytes; send less at a time")
