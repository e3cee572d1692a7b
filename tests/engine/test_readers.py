"""Reads of a real FIFO, which hang as those of a stalled network folder do."""

import os
import queue
import threading
import time

import pytest

from jblock.engine.weights.readers import HungRead, Readers

LONG = 60.0


@pytest.fixture
def fifo(tmp_path):
    """A path whose reading hangs until the test ends."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    yield path
    with open(os.open(path, os.O_RDWR), "wb") as file:
        file.write(b"x")


def answers():
    box = queue.SimpleQueue()
    return box, lambda result, error: box.put((result, error))


def test_a_hung_read_is_given_up_and_counted(fifo):
    readers = Readers(0.5)
    with pytest.raises(HungRead, match=r"reading adapter 'a' did not end within 0.5 seconds"):
        readers.run("adapter", "adapter 'a'", fifo.read_bytes)
    assert readers.hung == 1
    readers.close()


def test_what_waits_behind_a_hung_read_begins_before_its_limit(fifo):
    readers = Readers(10 * LONG)
    hung, done = answers()
    readers.submit("adapter", "a", fifo.read_bytes, done)
    begin = time.monotonic()
    assert readers.run("adapter", "b", lambda: 5) == 5
    assert time.monotonic() - begin < LONG / 4
    assert readers.run("weights", "c", lambda: 6) == 6
    assert hung.empty() and readers.hung == 0
    readers.close()


def test_many_hung_reads_hold_nobody_up(fifo):
    readers = Readers(2.0)
    hung, done = answers()
    for i in range(5):
        readers.submit("adapter", str(i), fifo.read_bytes, done)
    assert readers.run("adapter", "b", lambda: 5) == 5
    for _ in range(5):
        assert isinstance(hung.get(timeout=LONG)[1], HungRead)
    assert readers.hung == 5
    readers.close()


def test_reads_of_a_kind_run_one_after_another_and_in_order():
    readers = Readers(LONG)
    order, box = [], queue.SimpleQueue()
    lock = threading.Lock()

    def work(i):
        assert lock.acquire(blocking=False)
        order.append(i)
        time.sleep(0.01)
        lock.release()

    for i in range(8):
        readers.submit("weights", str(i), lambda i=i: work(i), lambda r, e: box.put(e))
    assert [box.get(timeout=LONG) for _ in range(8)] == [None] * 8
    assert order == list(range(8))
    readers.close()


def test_an_error_reaches_who_asked():
    readers = Readers(LONG)
    with pytest.raises(ZeroDivisionError):
        readers.run("weights", "w", lambda: 1 / 0)
    readers.close()


def test_a_read_that_storage_fails_is_tried_again():
    readers, left = Readers(LONG), [OSError(5, "once"), OSError(5, "twice")]

    def work():
        if left:
            raise left.pop(0)
        return 7

    assert readers.run("adapter", "a", work) == 7
    readers.close()
