"""A client of the HTTP API that shows what is on the wire."""

import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


class Answer:
    """Status, headers and content."""

    def __init__(self, status: int, headers: Any, body: bytes):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert set(self.json) == {"error"} and set(self.json["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events; the last one must be [DONE]."""
        *events, last = [e.removeprefix("data: ") for e in self.body.decode().split("\n\n")[:-1]]
        assert last == "[DONE]"
        return [json.loads(e) for e in events]


def ask(
    port: int, path: str, content: Any = None, key: str | None = None, **headers: str
) -> Answer:
    """GET without content, else POST; content that is not bytes goes as JSON."""
    data = (
        content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    )
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return Answer(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


@contextlib.contextmanager
def raw(port: int, path: str, content: Any, small: bool = False) -> Iterator[socket.socket]:
    """A request on a socket of the test's own, which may leave at any time; a `small` one takes little
    unread."""
    body = json.dumps(content).encode()
    with socket.socket() as one:
        if small:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(20)
        one.connect(("127.0.0.1", port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        one.sendall(head.encode() + body)
        yield one
