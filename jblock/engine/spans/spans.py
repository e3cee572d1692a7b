"""An agent's part in chains that go over several agents: home of some sequences, host to spans of others."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from jblock.engine.graph.graph import Hop, Route
from jblock.engine.programs import row_moves
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Stepper
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import WorkItem
from jblock.engine.spans.guests import Guests
from jblock.engine.spans.home import Home
from jblock.engine.spans.messages import Close, Closed, Gone, Message, Open, Opened, Rows
from jblock.engine.spans.port import Port
from jblock.engine.weights.cache import WeightCache


class Spans:
    """Called by the loop's thread alone.

    Attributes:
      home: of this agent's own sequences.
      guests: spans of others'.
    """

    def __init__(
        self,
        port: Port,
        device: Runner,
        sequences: Scheduler,
        stepper: Stepper,
        weight_cache: WeightCache,
        finish: Callable[..., None],
    ):
        """See `Home` and `Guests`."""
        self.home = Home(port, device, sequences, stepper, finish)
        self.guests = Guests(port, device, sequences, stepper, weight_cache)
        self._device = device
        # At most what is on its way for every open span.
        self._arrived: list[tuple[int, Rows, Any]] = []
        stepper.leave = self.leave

    def take(self, sent: tuple[int, Message, Any], routes: Mapping[str, Route]) -> None:
        """A message of another agent as `Receive` describes; rows wait for `take_rows`."""
        sender, message, rows = sent
        match message:
            case Rows():
                if self._is_sound(message, rows):
                    self._arrived.append((sender, message, rows))
                else:
                    logging.error("rows of agent %d are not what they say: dropped", sender)
            case Open():
                self.guests.open(sender, message, routes)
            case Opened():
                self.home.opened(sender, message)
            case Close():
                self.guests.close(sender, message)
            case Closed():
                self.home.closed(message)
            case Gone():
                self._arrived = [a for a in self._arrived if a[0] != sender]
                self.home.gone(sender)
                self.guests.gone(sender)

    def _is_sound(self, message: Rows, rows: Any) -> bool:
        return (
            message.width in self._device.state.registers
            and rows is not None
            and message.count > 0
            and rows.shape == (row_moves.size_for(message.count), message.width)
        )

    def take_rows(self) -> None:
        """Makes what has arrived ready at its blocks: of each agent one group of decoding rows, for another
        that came while it waited is the turn of the next step, as it is on all agents."""
        now = time.monotonic()
        self.home.expire(now)
        self.guests.expire(now)
        left: list[tuple[int, Rows, Any]] = []
        decoding: set[int] = set()
        for sender, message, rows in self._arrived:
            decodes = any(item.chunk == 1 for item in message.items)
            if (decodes and sender in decoding) or not self._put(sender, message, rows):
                left.append((sender, message, rows))
            elif decodes:
                decoding.add(sender)
        self._arrived = left
        self.home.go_on()

    def _put(self, sender: int, message: Rows, rows: Any) -> bool:
        if message.back:
            self.home.arrive(sender, message, rows)
            return True
        return self.guests.arrive(sender, message, rows)

    def leave(self, hop: Hop, items: Sequence[WorkItem]) -> None:
        """Items have come to where they leave."""
        if hop.agent is None:
            self.guests.leave(hop, items)
        else:
            self.home.leave(hop, items)
