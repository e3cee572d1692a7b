"""Messages and rows over streams between hosts: what comes is what was sent, and who is gone is told of."""

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from host_agents import free_address, secret_file

from jblock.engine.spans import network
from jblock.engine.spans.messages import Close, Gone, Opened, RowItem, Rows
from jblock.engine.spans.network import NetworkPort
from jblock.hosts import streams
from jblock.hosts.credentials import from_files
from jblock.parallel.placement import SINGLE

LONG = 120.0


class Ports:
    """Ports of agents that belong together.

    Attributes:
      address: of the home.
      files: of all.
    """

    def __init__(self, folder: Path):
        self.address, self.files = free_address(), {"secret_file": secret_file(folder)}
        self._made: list[NetworkPort] = []

    def make(self, agent: int, session: str = "s") -> tuple[NetworkPort, queue.SimpleQueue]:
        """A port, and what it receives."""
        received: queue.SimpleQueue = queue.SimpleQueue()
        made = NetworkPort(
            agent, SINGLE, session=session, home=self.address, listen=self.address, files=self.files
        )
        made.listen(lambda *sent: received.put(sent))
        self._made.append(made)
        return made, received

    def close(self) -> None:
        for port in self._made:
            port.close()


@pytest.fixture
def ports(tmp_path) -> Iterator[Ports]:
    made = Ports(tmp_path)
    yield made
    made.close()


def rows_of(count: int, width: int) -> tuple[Rows, np.ndarray]:
    """A message and its rows, with what fills them up."""
    items = (RowItem(key=2**60, span=1, start=7, q_len=count, chunk=16),)
    size = 1 << (count - 1).bit_length()
    values = np.arange(size * width, dtype=np.float32).reshape(size, width)
    return Rows(width=width, items=items, back=True), values


def test_rows_and_messages_arrive_in_order_within_a_window(ports, monkeypatch):
    monkeypatch.setattr(network, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(network, "_WINDOW_BYTES", 4000)
    monkeypatch.setattr(network, "_TELL_BYTES", 1000)
    home, at_home = ports.make(0)
    agent, at_agent = ports.make(3)
    assert at_home.get(timeout=LONG)[:2] == (3, Gone())
    assert at_agent.get(timeout=LONG)[:2] == (0, Gone())
    sent = [(Opened(key=1, found=16), None), *[rows_of(n, 64) for n in (5, 1, 3, 33, 15)]]
    sent += [(Close(key=1, token_ids=tuple(range(10_000)), poisoned=False), None)]
    for to, own in ((3, home), (0, agent)):  # Both ways at once.
        for message, rows in sent:
            own.send(to, message, rows)
    for to, there in ((3, at_agent), (0, at_home)):
        for message, rows in sent:
            sender, other, values = there.get(timeout=LONG)
            assert (sender, other) == (3 - to, message)
            if rows is None:
                assert values is None
            else:
                assert values.shape == rows.shape
                np.testing.assert_array_equal(values[: message.count], rows[: message.count])
    home.send(2, Opened(key=1, found=0))  # Nobody: lost.


def test_an_agent_of_others_is_left_and_nonsense_ends_a_link(ports):
    _, at_home = ports.make(0)
    ports.make(1, session="others")
    known = from_files(ports.files)
    head = network._HEADER.pack
    nonsense = (b"", b"x" * 30, head(1, 0) + b"x", head(network._PIECE, 8) + bytes(8))
    for peer, frame in enumerate(nonsense, 5):
        stream = streams.connect(ports.address, "jblock.rows.1", known)
        stream.send(network._HELLO.pack(peer) + b"s")
        assert stream.receive() == b""
        stream.send(frame)
        with pytest.raises(streams.StreamEnded):
            stream.receive()
        stream.close()
    said = [at_home.get(timeout=LONG)[:2] for _ in range(8)]
    assert sorted(said, key=str) == [(peer, Gone()) for peer in (5, 5, 6, 6, 7, 7, 8, 8)]
    assert at_home.empty()  # Nothing of agent 1.


def test_another_home_in_the_place_of_the_first_is_found(ports):
    home, _ = ports.make(0)
    _, at_agent = ports.make(1)
    assert at_agent.get(timeout=LONG)[:2] == (0, Gone())
    home.close()
    assert at_agent.get(timeout=LONG)[1] == Gone()
    second, at_second = ports.make(0)
    assert at_second.get(timeout=LONG)[:2] == (1, Gone())
    second.send(1, Opened(key=5, found=0))
    while (got := at_agent.get(timeout=LONG)[1]) == Gone():
        pass
    assert got == Opened(key=5, found=0)


def test_rows_that_are_not_taken_end_the_link(monkeypatch):
    monkeypatch.setattr(network, "_WINDOW_BYTES", 4000)
    monkeypatch.setattr(network, "_TELL_BYTES", 1000)
    monkeypatch.setattr(network, "_PATIENCE_SECONDS", 0.05)

    class Silent(streams.Stream):
        """Somebody who takes rows and never says so."""

        def __init__(self):
            super().__init__(lambda: None)
            self.sent = 0

        def send(self, frame):
            if self._closed.is_set():
                raise streams.StreamEnded("closed")
            self.sent += len(frame)

    stream = Silent()
    link = network._NetworkLink(stream)
    for _ in range(10):
        link.put(*rows_of(4, 64))
    assert stream._closed.wait(LONG)
    assert 3000 < stream.sent < 6000
