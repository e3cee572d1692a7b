"""What uvicorn's HTTP/1.1 connections lack: limits of what a client may send before its request is known,
answers to what is no HTTP in the form of all other errors, and a way to send without waiting."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http.errors import HTTPError, body_of

# Seconds from a connection, or from the first byte of a further request on it, to the end of the headers.
HEAD_SECONDS = 10.0
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# Under this key a request's scope has its connection.
SCOPE_KEY = "jblock.connection"


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _wrong: HTTPError | None = None

    @property
    def writable(self) -> bool:
        """Whether what is written now is taken without waiting."""
        return not self.flow.write_paused and not self.transport.is_closing()

    def write_chunk(self, body: bytes) -> None:
        """Sends a piece of the answer that is being streamed."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._wrong = _too_large()
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[SCOPE_KEY] = self  # type: ignore[literal-required]
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_over()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._wrong = _too_large()
            raise self._wrong  # Which ends the parsing, and comes back as a 400.
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request that can be read, and closes."""
        self._head_over()
        error = self._wrong or HTTPError(400, "request: is no HTTP/1.1; send it by an HTTP client")
        body = body_of(error, error.status)
        self.transport.write(
            b"HTTP/1.1 %d Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (error.status, len(body), body)
        )
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_over(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer, self._head_bytes = None, 0

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._wrong = HTTPError(
                408, f"request: no headers came in {HEAD_SECONDS:g} s; send them at once"
            )
            self.send_400_response("")


def _too_large() -> HTTPError:
    return HTTPError(
        431,
        f"headers: are over {MAX_HEADERS} or {MAX_HEAD_BYTES} bytes; send fewer, or less in them",
    )
