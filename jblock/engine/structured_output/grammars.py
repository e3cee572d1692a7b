"""The grammars of an engine's sequences, followed in a process beside it (`worker.py`)."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, Pipe

import numpy as np
from absl import logging

from jblock.engine.structured_output import wire

# One state takes microseconds, a bad one milliseconds, and a large tokenizer's tables a few seconds once.
_MOST_SECONDS = 60.0
# Processes that may end under a sequence before its grammar is blamed.
_MOST_DEATHS = 2
_LOOK_SECONDS = 1.0


class Constraint:
    """What one sequence may go on with. The engine's loop reads it, another thread writes it.

    Attributes:
      request_id: whose.
      mask: uint32 words, a bit for each token id that may follow; None while it is not known.
      complete: the grammar is at its end, nothing may follow.
      problem: why the grammar cannot be followed any more, or "".
    """

    def __init__(self, request_id: str, begin: wire.Begin):
        self.request_id = request_id
        self.mask: np.ndarray | None = None
        self.complete = False
        self.problem = ""
        self._begin = begin
        self._tokens = list(begin.tokens)
        self._since = time.monotonic()
        self._deaths = 0

    @property
    def ready(self) -> bool:
        """Whether it is known what may follow."""
        return self.mask is not None

    @property
    def settled(self) -> bool:
        """Whether nothing has to be waited for: it is known what may follow, or that nothing may."""
        return self.ready or self.complete or bool(self.problem)


class Grammars:
    """Those of one engine. The process is begun with the first sequence that needs it.

    Attributes:
      notify: called, from another thread, when a sequence that waits for its first mask may begin, or when
        one is over.
      open: the sequences that are followed, by a number; only the loop's thread adds and takes out.
    """

    def __init__(self) -> None:
        self.notify: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self.open: dict[int, Constraint] = {}
        self._over: list[Constraint] = []
        self._next_id = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[list[wire.ToWorker] | None] = queue.SimpleQueue()
        self._closed = False

    def begin(
        self,
        request_id: str,
        grammar: str,
        tokenizer: str,
        vocab_size: int,
        end_ids: tuple[int, ...],
        tokens: Iterable[int],
    ) -> Constraint:
        """Follows the grammar of a sequence that has these tokens; returns at once.

        Args:
          request_id: whose.
          grammar: as llguidance writes it.
          tokenizer: file of the tokenizer.
          vocab_size: ids of the model.
          end_ids: of the model, which may follow where the grammar may end.
          tokens: that it generated so far.
        """
        with self._changed:
            self._next_id += 1
            begin = wire.Begin(
                self._next_id, tokenizer, vocab_size, end_ids, grammar, tuple(tokens)
            )
            constraint = self.open[begin.id] = Constraint(request_id, begin)
            if self._process is None:
                self._start()
            self._outbox.put([begin])
        return constraint

    def take(self, taken: Iterable[tuple[Constraint, int]]) -> None:
        """Tells what was generated; the masks are unknown until they come."""
        with self._changed:
            messages: list[wire.ToWorker] = []
            for constraint, token in taken:
                constraint._tokens.append(token)
                constraint.mask = None
                constraint._since = time.monotonic()
                messages.append(wire.Take(constraint._begin.id, token))
            if messages:
                self._outbox.put(messages)

    def wait(self, constraints: Iterable[Constraint], seconds: float) -> None:
        """Waits until all are settled, but not for longer."""
        wanted = list(constraints)
        with self._changed:
            self._changed.wait_for(lambda: all(c.settled for c in wanted), seconds)

    def end(self, constraint: Constraint) -> None:
        """A sequence is over."""
        with self._changed:
            if self.open.pop(constraint._begin.id, None) is not None:
                self._outbox.put([wire.End(constraint._begin.id)])

    def over(self) -> list[Constraint]:
        """Those that have become complete, or failed, since the last call."""
        if not self._over:
            return []
        with self._changed:
            over, self._over = self._over, []
        return over

    def close(self) -> None:
        """Ends the process."""
        with self._changed:
            self._closed = True
            process = self._process
            self._outbox.put(None)
        if process is not None:
            process.kill()
            process.wait()

    # With the lock held.

    def _start(self) -> None:
        """Begins a process, and tells it of all that is open."""
        self._outbox = queue.SimpleQueue()
        ours, theirs = Pipe()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "jblock.engine.structured_output.worker",
                    str(theirs.fileno()),
                ],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._process = process
        for target, arguments in (
            (self._write, (ours, self._outbox)),
            (self._read, (ours, process)),
        ):
            threading.Thread(target=target, args=arguments, name="grammars", daemon=True).start()

    def _replace(self) -> None:
        """After the process ended: another one takes up all that is open."""
        if self._closed:
            return
        self._process = None
        logging.error("the process that follows grammars ended; another one takes its work up")
        for constraint in list(self.open.values()):
            if not constraint.settled:
                constraint._deaths += 1
                if constraint._deaths >= _MOST_DEATHS:
                    self._fail(constraint, "it ended the process that follows it")
        again = [c for c in self.open.values() if not (c.complete or c.problem)]
        if not again:
            return
        self._start()
        messages: list[wire.ToWorker] = []
        for constraint in again:
            begin = constraint._begin
            constraint._since = time.monotonic()
            messages.append(
                wire.Begin(
                    begin.id,
                    begin.tokenizer,
                    begin.vocab_size,
                    begin.end_ids,
                    begin.grammar,
                    tuple(constraint._tokens),
                )
            )
        self._outbox.put(messages)

    def _fail(self, constraint: Constraint, problem: str) -> None:
        if not constraint.problem:
            constraint.problem = problem
            self._over.append(constraint)

    # Threads of their own.

    def _write(
        self, connection: Connection, outbox: "queue.SimpleQueue[list[wire.ToWorker] | None]"
    ) -> None:
        while (messages := outbox.get()) is not None:
            with contextlib.suppress(OSError):  # The reader sees that it ended.
                connection.send_bytes(wire.encoder.encode(messages))

    def _read(self, connection: Connection, process: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                if not connection.poll(_LOOK_SECONDS):
                    self._look(process)
                    continue
                states = wire.to_engine.decode(connection.recv_bytes())
            except (EOFError, OSError):
                break
            self._note(states)
        process.kill()
        process.wait()
        with self._changed:
            self._outbox.put(None)
            self._replace()
            self._changed.notify_all()
        self.notify()

    def _note(self, states: list[wire.State]) -> None:
        waking = False
        with self._changed:
            for state in states:
                constraint = self.open.get(state.id)
                if constraint is None:
                    continue
                # Until a sequence is told of, nobody looks whether it may begin.
                waking |= state.count == len(constraint._begin.tokens) or not state.mask
                if state.problem:
                    self._fail(constraint, state.problem)
                elif state.count == len(constraint._tokens):
                    if state.mask:
                        constraint.mask = _words(state.mask)
                    else:
                        constraint.complete = True
                        self._over.append(constraint)
            self._changed.notify_all()
        if waking:
            self.notify()

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the process if it has been at one state for too long."""
        late = time.monotonic() - _MOST_SECONDS
        with self._changed:
            stuck = [c for c in self.open.values() if not c.settled and c._since < late]
            for constraint in stuck:
                self._fail(constraint, f"one of its states took over {_MOST_SECONDS:g} s")
        if stuck:
            process.kill()


def _words(mask: bytes) -> np.ndarray:
    return np.frombuffer(mask + b"\0" * (-len(mask) % 4), "<u4")
