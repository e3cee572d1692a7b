"""uvicorn inside the server's own event loop: sockets of ours, and signals that stay ours."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from serving import addresses
from serving.http.connection import Connection
from serving.tls import peer_of_http

# What the kernel keeps of answers that a client does not read; more would be memory that no limit knows of.
_SEND_BUFFER_BYTES = 256 * 1024
_BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The server that we are a part of has its own handlers."""
        yield


class _Protocol(Connection):
    """Tells the application whose certificate a connection came with, as `peer` of its state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = peer_of_http(transport.get_extra_info("ssl_object"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["peer"] = self._peer


class Listener:
    """An HTTP server around an ASGI application.

    Attributes:
      port: where it listens, once started; 0 for a unix socket.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        last_words_seconds: float,
        tls: ssl.SSLContext | None = None,
    ):
        """`last_words_seconds` is how long answers may go on once it is stopped."""
        self.port = 0
        self._host, self._asked = host, port
        config = uvicorn.Config(
            app,
            loop="none",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(last_words_seconds)),
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._task: asyncio.Task | None = None
        self._socket: socket.socket | None = None

    async def start(self) -> None:
        """Listens.

        Raises:
          OSError: the port is taken.
        """
        self._socket = _listening(self._host, self._asked)
        if not addresses.is_unix(self._host):
            self.port = self._socket.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if not self._server.started:
            self._task.result()  # Why it ended.

    async def stop(self) -> None:
        """Closes every connection, after a moment for what is being sent."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait((self._task,))
        if self._socket is not None:
            self._socket.close()
            if addresses.is_unix(self._host):
                with contextlib.suppress(OSError):
                    os.unlink(self._host.removeprefix("unix:"))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      OSError: it cannot.
    """
    try:
        if addresses.is_unix(host):
            path = host.removeprefix("unix:")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # One that nobody listens on: `check_host` has looked.
            made, where = socket.socket(socket.AF_UNIX), path
        else:
            bare = host.removeprefix("[").removesuffix("]")
            found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]  # type: ignore[assignment]
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        made.bind(where)
        made.listen(_BACKLOG)
    except OSError as error:
        raise OSError("http_" + addresses.why_not(host, port)) from error
    made.setblocking(False)
    return made
