"""The process that follows the grammars of an engine's sequences. It holds nothing else, so it may be ended
and begun again at any time.

It is a process because building llguidance's tables for a large vocabulary takes seconds in which no other
Python thread of the process runs, and because a grammar that takes all memory or ends the library takes this
process with it and not the engine's.
"""

import concurrent.futures
import functools
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import llguidance
from llguidance import LLMatcher, LLTokenizer

from jblock.engine.structured_output import wire

# Of all grammars together.
_MAX_MEMORY_BYTES = 8 * 10**9
# Sequences that are worked on at a time; a slow state holds up no others but where all are.
_THREADS = 8
_TOKENIZERS = 16

# What one state may take; a lexer's state has one or two kB.
LIMITS = llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


@functools.lru_cache(_TOKENIZERS)
def _load(path: str, vocab_size: int, end_ids: tuple[int, ...]) -> LLTokenizer:
    text = Path(path).read_text()
    # A tokenizer may have tokens that the model has no row for.
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(end_ids) or None)
    except ValueError as error:
        if "vocab size too small" not in str(error):
            raise
        return LLTokenizer(text, eos_token=list(end_ids) or None)


_loading = threading.Lock()


def tokenizer(path: str, vocab_size: int, end_ids: tuple[int, ...]) -> LLTokenizer:
    """The tables of a tokenizer, made once."""
    with _loading:
        return _load(path, vocab_size, end_ids)


class Matcher:
    """One sequence."""

    def __init__(self, begin: wire.Begin):
        self._begin = begin
        self.last: concurrent.futures.Future[None] | None = None  # What was asked of it last.
        self._matcher: LLMatcher | None = None
        self._count = len(begin.tokens)

    def start(self) -> wire.State:
        """Where it stands at first."""
        begin = self._begin
        table = tokenizer(begin.tokenizer, begin.vocab_size, begin.end_ids)
        self._matcher = LLMatcher(table, begin.grammar, log_level=0, limits=LIMITS)
        if begin.tokens:
            self._matcher.consume_tokens(list(begin.tokens))
        return self._state()

    def take(self, token: int) -> wire.State:
        """Where it stands after one more token."""
        assert self._matcher is not None
        self._count += 1
        self._matcher.consume_token(token)
        return self._state()

    def _state(self) -> wire.State:
        matcher, id, count = self._matcher, self._begin.id, self._count
        assert matcher is not None
        mask = b""
        if not matcher.is_error() and not matcher.is_stopped():
            mask = matcher.compute_bitmask()
        if matcher.is_error():
            return wire.State(id, count, problem=problem_of(matcher))
        if matcher.is_stopped():
            return wire.State(id, count)
        return wire.State(id, count, mask)


def problem_of(matcher: LLMatcher) -> str:
    """Why a matcher goes on no more, in a line."""
    lines = [line for line in matcher.get_error().splitlines() if line and line[0] != "<"]
    return (lines[0] if lines else "it goes on no more")[:500]


class Worker:
    """Answers what comes over a connection."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._matchers: dict[int, Matcher] = {}
        self._states: queue.SimpleQueue[wire.State] = queue.SimpleQueue()
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        threading.Thread(target=self._write, daemon=True).start()

    def run(self) -> None:
        """Until the other end is closed."""
        while True:
            try:
                messages = wire.to_worker.decode(self._connection.recv_bytes())
            except (EOFError, OSError):
                return
            for message in messages:
                match message:
                    case wire.Begin():
                        matcher = self._matchers[message.id] = Matcher(message)
                        self._submit(message.id, matcher, matcher.start)
                    case wire.Take():
                        matcher = self._matchers[message.id]
                        take = functools.partial(matcher.take, message.token)
                        self._submit(message.id, matcher, take)
                    case wire.End():
                        self._matchers.pop(message.id, None)

    def _submit(self, id: int, matcher: Matcher, work: Callable[[], wire.State]) -> None:
        matcher.last = self._pool.submit(self._answer, id, work, matcher.last)

    def _answer(
        self,
        id: int,
        work: Callable[[], wire.State],
        before: concurrent.futures.Future[None] | None,
    ) -> None:
        # A process that takes up another's work may be told of a token while it still begins. Work is
        # begun in the order in which it came, so the oldest never waits.
        if before is not None:
            concurrent.futures.wait([before])
        try:
            state = work()
        except Exception as error:
            state = wire.State(id, -1, problem=f"{type(error).__name__}: {error}"[:500])
        self._states.put(state)

    def _write(self) -> None:
        while True:
            states = [self._states.get()]
            while not self._states.empty():
                states.append(self._states.get())
            try:
                self._connection.send_bytes(wire.encoder.encode(states))
            except OSError:
                return


def main() -> None:
    """Answers until the engine closes the pipe, whose number is the only argument."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Worker(Connection(int(sys.argv[1]))).run()
    os._exit(0)  # A grammar that is being worked on is nobody's any more.


if __name__ == "__main__":
    main()
