"""What joins agents, misbehaving when told to."""

import threading
from collections.abc import Callable
from typing import Any

from jblock.engine.spans.messages import Message, Rows
from jblock.engine.spans.port import Port

KINDS = ("drop", "delay", "duplicate", "cut")
"""What can happen to the messages of an agent."""


class FaultyPort:
    """A `Port` over another one. Messages keep their order."""

    def __init__(self, port: Port):
        self.agent = port.agent
        self._port = port
        self._lock = threading.Lock()
        self._kind, self._left = "", 0
        self._held: list[tuple[int, Message, Any]] | None = None

    def misbehave(self, kind: str, count: int) -> None:
        """The next so many messages are dropped, come twice, or are cut: of rows the last one is missing,
        of other messages all. With "delay" nothing more leaves until `release`."""
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; give one of {', '.join(KINDS)}")
        with self._lock:
            if kind == "delay":
                self._held = [] if self._held is None else self._held
            else:
                self._kind, self._left = kind, count

    def release(self) -> None:
        """What was held back leaves."""
        with self._lock:
            held, self._held = self._held or [], None
            for one in held:
                self._port.send(*one)

    def send(self, agent: int, message: Message, rows: Any = None) -> None:
        """See `Port`."""
        with self._lock:
            for one in self._made_of(agent, message, rows):
                if self._held is None:
                    self._port.send(*one)
                else:
                    self._held.append(one)

    def _made_of(self, *sent: Any) -> list[tuple[int, Message, Any]]:
        agent, message, rows = sent
        if not self._left:
            return [sent]
        self._left -= 1
        if self._kind == "duplicate":
            return [sent, sent]
        if self._kind == "cut" and isinstance(message, Rows):
            return [(agent, message, rows[: message.count - 1])]
        return []

    def listen(self, receive: Callable) -> None:
        """See `Port`."""
        self._port.listen(receive)

    def close(self) -> None:
        """See `Port`."""
        self._port.close()
