"""How rows and messages get from one agent to another."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jblock.engine.spans.messages import Message
from jblock.parallel.placement import Placement

Receive = Callable[[int, Message, Any], None]
"""Takes a message, who sent it, and the rows that belong to it; called on any thread, and returns at once."""


class Port(Protocol):
    """One agent's end of what joins them. Messages of one agent to another come in order, if they come.

    Attributes:
      agent: whose it is.
    """

    agent: int

    def send(self, agent: int, message: Message, rows: jax.Array | None = None) -> None:
        """Sends a message, and rows on this agent's devices; returns at once."""
        ...

    def listen(self, receive: Receive) -> None:
        """Has messages handed over from now on."""
        ...

    def close(self) -> None:
        """Neither sends nor hands over any more."""
        ...


class LocalPort:
    """Between threads of one process, each with devices of its own: rows go from device to device."""

    def __init__(self, agent: int, ports: Mapping[int, "LocalPort"], placement: Placement):
        """A port among others.

        Args:
          agent: whose it is.
          ports: of all agents, this one too.
          placement: its devices.
        """
        self.agent = agent
        self._ports, self._placement = ports, placement
        self._receive: Receive | None = None

    def send(self, agent: int, message: Message, rows: jax.Array | None = None) -> None:
        """See `Port`."""
        self._ports[agent].deliver(self.agent, message, rows)

    def deliver(self, sender: int, message: Message, rows: jax.Array | None) -> None:
        """Takes a message for this agent; one that is not there yet, or any more, hears nothing."""
        receive = self._receive
        if receive is not None:
            if rows is not None and (sharding := self._placement.sharding("rows")) is not None:
                rows = jax.device_put(rows, sharding)
            receive(sender, message, rows)

    def listen(self, receive: Receive) -> None:
        """See `Port`."""
        self._receive = receive

    def close(self) -> None:
        """See `Port`."""
        self._receive = None
