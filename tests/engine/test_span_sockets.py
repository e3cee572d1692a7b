"""Messages and rows over real sockets: what comes is what was sent, and who is gone is told of."""

import contextlib
import os
import queue
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jblock.engine.spans.messages import Close, Gone, Opened, RowItem, Rows
from jblock.engine.spans.sockets import SocketPort
from jblock.parallel.placement import SINGLE

LONG = 60.0


MADE: list[SocketPort] = []


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="jblock-") as path:
        yield Path(path)
        while MADE:
            MADE.pop().close()


def port(agent: int, folder: Path) -> tuple[SocketPort, queue.SimpleQueue]:
    """A port, and what it receives."""
    made, received = SocketPort(agent, folder, SINGLE), queue.SimpleQueue()
    made.listen(lambda *sent: received.put(sent))
    MADE.append(made)
    return made, received


def rows_of(count: int, width: int) -> tuple[Rows, np.ndarray]:
    """A message and its rows, with what fills them up."""
    items = (RowItem(key=2**60, span=1, start=7, q_len=count, chunk=16),)
    size = 1 << (count - 1).bit_length()
    values = np.arange(size * width, dtype=np.float32).reshape(size, width)
    return Rows(width=width, items=items, back=True), values


def test_rows_and_messages_arrive_in_order(folder):
    home, at_home = port(0, folder)
    agent, at_agent = port(3, folder)
    assert at_home.get(timeout=LONG)[:2] == (3, Gone())
    assert at_agent.get(timeout=LONG)[:2] == (0, Gone())
    sent = [(Opened(key=1, found=16), None), rows_of(5, 8), rows_of(1, 1024)]
    sent.append((Close(key=1, token_ids=tuple(range(10_000)), poisoned=False), None))
    for to, own, there in ((3, home, at_agent), (0, agent, at_home)):
        for message, rows in sent:
            own.send(to, message, rows)
        for message, rows in sent:
            sender, other, values = there.get(timeout=LONG)
            assert (sender, other) == (3 - to, message)
            if isinstance(message, Rows):
                assert values.shape == rows.shape
                np.testing.assert_array_equal(values[: message.count], rows[: message.count])
            else:
                assert values is None
    home.send(2, Opened(key=1, found=0))  # nobody: lost


def test_a_stranger_who_talks_nonsense_is_left_and_another_home_is_found(folder):
    home, at_home = port(0, folder)
    for data in (
        b"\xff" * 100,
        struct.pack("!IIQ", 5, 2**31, 0),
        struct.pack("!IIQ", 5, 1, 0) + b"x",
    ):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as stranger:
            stranger.connect(str(folder / "home"))
            stranger.sendall(data)
            stranger.settimeout(LONG)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
    _, at_agent = port(1, folder)
    while at_home.get(timeout=LONG)[:2] != (1, Gone()):
        pass
    assert at_agent.get(timeout=LONG)[:2] == (0, Gone())
    # Another one takes the home's place: the agent finds it by itself.
    second, at_second = port(0, folder)
    home._links[1].close()
    assert at_agent.get(timeout=LONG)[1] == Gone()
    assert at_second.get(timeout=LONG)[:2] == (1, Gone())
    second.send(1, Opened(key=5, found=0))
    while (got := at_agent.get(timeout=LONG)[1]) == Gone():
        pass
    assert got == Opened(key=5, found=0)


def test_a_folder_open_to_others_is_refused(folder):
    os.chmod(folder, 0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        SocketPort(0, folder, SINGLE)
