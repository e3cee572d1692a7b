"""Messages and rows over real sockets: what comes is what was sent, and who is gone is told of."""

import contextlib
import os
import queue
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.engine.spans import shared_memory, sockets
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
                while said := stranger.recv(100):
                    assert said == sockets._MEMORY
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


def test_rows_lie_in_shared_memory_while_there_is_room():
    file = shared_memory.new_file(1024)
    writes, reads = shared_memory.Ring(os.dup(file)), shared_memory.Ring(file)
    rng, waiting, read, inline = np.random.default_rng(0), [], 0, 0
    for _ in range(500):
        body = rng.bytes(int(rng.integers(1, 600)))
        position = writes.put(memoryview(body))
        if position is None:  # Goes another way.
            inline += 1
            assert waiting
        else:
            waiting.append((position, body))
        while waiting and (position is None or rng.random() < 0.5):
            at, expected = waiting.pop(0)
            got = bytearray(len(expected))
            reads.take(at, memoryview(got))
            assert got == expected
            read += 1
            position = at
    assert read > 200 and inline > 50
    assert writes.put(memoryview(bytes(1025))) is None
    with pytest.raises(ValueError, match="500 bytes at 600 of 1024"):
        reads.take(1024 + 600, memoryview(bytearray(500)))


def test_rows_that_find_no_room_come_behind_their_message(folder, monkeypatch):
    monkeypatch.setattr(sockets, "new_file", lambda: shared_memory.new_file(256))
    _, at_home = port(0, folder)
    agent, at_agent = port(1, folder)
    assert at_home.get(timeout=LONG)[1] == at_agent.get(timeout=LONG)[1] == Gone()
    sent = [rows_of(n, 8) for n in (1, 40, 3, 8, 9, 2, 2, 2)]
    for message, rows in sent:
        agent.send(0, message, rows)
    for message, rows in sent:
        _, other, values = at_home.get(timeout=LONG)
        assert other == message
        np.testing.assert_array_equal(values[: message.count], rows[: message.count])


def test_who_sends_does_not_wait_for_who_reads(folder):
    reads, received = threading.Event(), queue.SimpleQueue()
    home = SocketPort(0, folder, SINGLE)
    MADE.append(home)

    def receive(*sent):
        received.put(sent)
        reads.wait(LONG)

    home.listen(receive)
    agent, at_agent = port(1, folder)
    assert at_agent.get(timeout=LONG)[1] == received.get(timeout=LONG)[1] == Gone()
    sent = [
        Close(key=i, token_ids=tuple(range(100 * (i % 40))), poisoned=False) for i in range(2000)
    ]
    for message in sent:  # More than a socket holds.
        agent.send(0, message)
    reads.set()
    assert [received.get(timeout=LONG)[1] for _ in sent] == sent


def test_a_folder_open_to_others_is_refused(folder):
    os.chmod(folder, 0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        SocketPort(0, folder, SINGLE)


@settings(max_examples=30)
@given(
    sizes=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2 * sockets._AT_A_TIME)), min_size=1, max_size=12
    ),
    cut=st.integers(1, 100_000),
)
def test_a_reader_gives_what_was_sent_however_it_comes(sizes, cut):
    sent = np.random.default_rng(cut).bytes(sum(size for _, size in sizes))
    ours, theirs = socket.socketpair()

    def send():
        for begin in range(0, len(sent), cut):
            theirs.sendall(sent[begin : begin + cut])
        theirs.close()

    writer = threading.Thread(target=send)
    writer.start()
    reader, got = sockets._Reader(ours), b""
    for into, size in sizes:
        if into:
            part = bytearray(size)
            reader.read_into(memoryview(part))
        else:
            part = reader.read(size)
        got += bytes(part)
    writer.join()
    assert got == sent
    with pytest.raises(ConnectionError):
        reader.read(1)
    ours.close()
