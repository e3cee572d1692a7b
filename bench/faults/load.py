"""Requests to an engine in which things go wrong, and what became of them."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence

from bench.report import progress
from jblock.engine.api import Engine, Output, Request

_AGAIN = ("UNAVAILABLE",)
"""Refusals that tell a client to send its request again."""


@dataclasses.dataclass
class _Open:
    asked: Request
    tokens: list[int]
    since: float


@dataclasses.dataclass
class Counts:
    """What became of requests.

    Attributes:
      answered: in full.
      again: that were refused before their first token, in words that say to send them again, and were.
      lost: that ended otherwise.
      twice: outputs behind the last one of their request, or beyond its length.
      parted: (request, tokens) with other tokens than in the quiet run.
      stuck: that got nothing for longer than the bound while nothing was wrong.
      longest_s: the longest that one got nothing while nothing was wrong.
    """

    answered: int = 0
    again: int = 0
    lost: int = 0
    twice: int = 0
    parted: list[tuple[Request, list[int]]] = dataclasses.field(default_factory=list)
    stuck: int = 0
    longest_s: float = 0.0


class Load:
    """Keeps requests open, of a fixed set.

    Attributes:
      counts: so far.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        expected: Mapping[str, list[int]],
        *,
        in_flight: int,
        stuck_seconds: float,
        rng: random.Random,
    ):
        """`expected` has the tokens of each of `requests` by its id, from a quiet run."""
        self.counts = Counts()
        self._engine, self._requests, self._expected = engine, requests, expected
        self._in_flight, self._stuck_seconds, self._rng = in_flight, stuck_seconds, rng
        self._open: dict[str, _Open] = {}
        self._ended: set[str] = set()
        self._numbers = itertools.count()
        self._waited_for: dict[str, int] = {}
        self._calm_since = time.monotonic()

    def fill(self) -> None:
        """Sends as many as are missing."""
        while len(self._open) < self._in_flight:
            self._send(self._rng.choice(self._requests))

    def _send(self, asked: Request) -> None:
        name = f"f{next(self._numbers)}"
        self._open[name] = _Open(asked, [], time.monotonic())
        self._engine.submit(dataclasses.replace(asked, request_id=name))

    def note_fault(self) -> None:
        """A fault begins: all that is open now has to go on behind it."""
        self._waited_for = {name: len(one.tokens) for name, one in self._open.items()}

    @property
    def went_on(self) -> bool:
        """Whether all that was open at the last fault has got a token since, or ended."""
        waits = self._waited_for
        return not any(len(self._open[n].tokens) <= waits[n] for n in waits if n in self._open)

    @property
    def idle(self) -> bool:
        """Whether nothing is open."""
        return not self._open

    def run(
        self, until: Callable[[], bool], tend: Callable[[], object], calm: Callable[[], bool]
    ) -> None:
        """Reads until something holds.

        Args:
          until: asked between two reads.
          tend: called between two reads.
          calm: whether nothing is wrong just now.
        """
        while not until():
            for output in self._engine.poll(0.02):
                self._take(output)
            tend()
            now = time.monotonic()
            if not calm():
                self._calm_since = now
            for name, one in list(self._open.items()):
                waited = now - max(one.since, self._calm_since)
                self.counts.longest_s = max(self.counts.longest_s, waited)
                if waited > self._stuck_seconds:
                    self.counts.stuck += 1
                    progress(f"{name} is stuck after {len(one.tokens)} tokens: {one.asked}")
                    self._end(name)
                    self._engine.cancel(name)

    def _end(self, name: str) -> None:
        del self._open[name]
        self._ended.add(name)

    def _take(self, output: Output) -> None:
        counts, one = self.counts, self._open.get(output.request_id)
        if one is None:
            # What was given up as stuck may still say that it was cancelled.
            counts.twice += bool(output.token_ids) or output.finish_reason != "cancelled"
            return
        one.tokens += output.token_ids
        if output.token_ids:
            one.since = time.monotonic()
        counts.twice += len(one.tokens) > one.asked.sampling.max_tokens
        if output.finish_reason is None:
            return
        self._end(output.request_id)
        if output.finish_reason == "length" and (len(one.tokens) == one.asked.sampling.max_tokens):
            counts.answered += 1
            if one.tokens != self._expected[one.asked.request_id]:
                counts.parted.append((one.asked, one.tokens))
        elif output.error_code in _AGAIN and not one.tokens:
            counts.again += 1
            self._send(one.asked)
        else:
            counts.lost += 1
            progress(f"lost after {len(one.tokens)} tokens: {output}")


def answers(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Tokens by request id, while nothing goes wrong.

    Raises:
      RuntimeError: one failed.
    """
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.submit(request)
    left = len(requests)
    while left:
        for output in engine.poll(1.0):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                left -= 1
                if output.finish_reason != "length":
                    raise RuntimeError(f"a request failed before anything was wrong: {output}")
    return tokens
