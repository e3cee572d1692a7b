"""Reads that may hang: each has a limit, and one that hangs holds no other up.

A read from a folder on a network may never return, and nothing can end the thread it hangs in. So a read
that takes long gets company (the next one begins on another thread), and one that passes the limit is given
up: whoever asked gets an error, and its thread is left behind.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging

Done = Callable[[Any, Exception | None], None]
"""Takes the result of a read, or its error."""

# Of one kind, reads are done one after another, for together they would only slow each other down. One that
# takes longer than this may hang, and the next begins beside it.
_SLOW_SECONDS = 1.0
# Reads of one kind at a time, those given up not counted: what they read has to fit the host's memory.
_MOST_AT_ONCE = 4
# Between the tries of a read that fails: what is wrong with storage is often over in a moment.
_PAUSES = (0.1, 0.3, 0.9, 1.2)
# Threads that hang, of one kind; further reads are refused, for storage that hangs so often is down.
_MOST_HUNG = 64
_CLOSED = "the engine was closed meanwhile"


class HungRead(OSError):
    """A read took longer than its limit and was given up."""


@dataclasses.dataclass(eq=False)
class _Read:
    name: str
    work: Callable[[], Any]
    done: Done
    began: float = 0.0
    over: bool = False  # Answered, or given up.


class Readers:
    """Runs reads in the background, by kind.

    Attributes:
      hung: reads that were given up so far.
    """

    def __init__(self, limit_seconds: float):
        """A read may take `limit_seconds`."""
        self.hung = 0
        self._limit = limit_seconds
        self._changed = threading.Condition()
        self._waiting: dict[str, collections.deque[_Read]] = {}
        self._running: dict[str, list[_Read]] = {}
        self._closed = False
        threading.Thread(target=self._watch, name="jblock-reads", daemon=True).start()

    def submit(self, kind: str, name: str, work: Callable[[], Any], done: Done) -> None:
        """Runs `work` after those of its kind that came before, unless these hang.

        Args:
          kind: reads of different kinds never wait for each other.
          name: what is read, for messages.
          work: the read.
          done: called once, on some thread, with its result or its error; `HungRead` where it took too long.
        """
        with self._changed:
            closed = self._closed
            if not closed:
                self._waiting.setdefault(kind, collections.deque()).append(_Read(name, work, done))
                self._running.setdefault(kind, [])
                self._begin(kind)
                self._changed.notify_all()
        if closed:
            done(None, OSError(_CLOSED))

    def run(self, kind: str, name: str, work: Callable[[], Any]) -> Any:
        """The result of a read that the caller waits for.

        Raises:
          HungRead: it took too long.
          Exception: what the read raised.
        """
        answered = threading.Event()
        answer: list[tuple[Any, Exception | None]] = []

        def done(result: Any, error: Exception | None) -> None:
            answer.append((result, error))
            answered.set()

        self.submit(kind, name, work, done)
        answered.wait()
        ((result, error),) = answer
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Begins nothing more; what was not read is answered with an OSError. Reads that run end by
        themselves, or never."""
        with self._changed:
            self._closed = True
            left = [read for waiting in self._waiting.values() for read in waiting]
            left += [
                read for running in self._running.values() for read in running if not read.over
            ]
            for read in left:
                read.over = True
            for waiting in self._waiting.values():
                waiting.clear()
            self._changed.notify_all()
        for read in left:
            read.done(None, OSError(_CLOSED))

    def _begin(self, kind: str) -> None:
        """Starts what may start now; the lock is held."""
        waiting, running = self._waiting[kind], self._running[kind]
        now = time.monotonic()
        while waiting and not self._closed:
            alive = [read for read in running if not read.over]
            fast = any(now - read.began < _SLOW_SECONDS for read in alive)
            if fast or len(alive) >= _MOST_AT_ONCE:
                return
            read = waiting.popleft()
            read.began = now
            running.append(read)
            threading.Thread(
                target=self._do, args=(kind, read), name=f"jblock-{kind}", daemon=True
            ).start()

    def _do(self, kind: str, read: _Read) -> None:
        result, error = _tried(read)
        with self._changed:
            self._running[kind].remove(read)
            given_up, read.over = read.over, True
            self._begin(kind)
        if given_up:
            logging.info("reading %s came to an end after all", read.name)
        else:
            read.done(result, error)

    def _watch(self) -> None:
        """Gives up what takes too long, and has the next begin beside what is slow."""
        while True:
            with self._changed:
                if self._closed:
                    return
                busy = any(self._running.values())
                self._changed.wait(_SLOW_SECONDS / 4 if busy else None)
                now = time.monotonic()
                late = []
                for kind, running in self._running.items():
                    late += [r for r in running if not r.over and now - r.began > self._limit]
                    stuck = sum(r.over for r in running)
                    if stuck < _MOST_HUNG:
                        self._begin(kind)
                    else:
                        late += self._waiting[kind]
                        self._waiting[kind].clear()
                for read in late:
                    read.over = True
                self.hung += len(late)
            for read in late:
                words = (
                    f"reading {read.name} did not end within {self._limit:g} seconds: its storage hangs; "
                    "look at the folder of the zoo, then ask again"
                )
                logging.error("%s", words)
                read.done(None, HungRead(words))


def _tried(read: _Read) -> tuple[Any, Exception | None]:
    """What a read brings; one of which storage says that it failed is tried again for some seconds."""
    for pause in (*_PAUSES, None):
        try:
            return read.work(), None
        except OSError as e:
            if pause is None or read.over or isinstance(e, HungRead):
                return None, e
        except Exception as e:
            return None, e
        time.sleep(pause)
    raise AssertionError("the last try returns")
