"""Sequences of this agent whose chain goes on on others."""

import collections
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from jblock.engine.config import Bucket
from jblock.engine.graph.graph import Hop
from jblock.engine.runner.batch import Batch
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Stepper
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import SequenceState, WorkItem
from jblock.engine.spans import rows as registers
from jblock.engine.spans.departures import Departures
from jblock.engine.spans.messages import Close, Closed, Open, Opened, RowItem, Rows
from jblock.engine.spans.port import Port

_NO_LIMIT = 2**62
# A step takes a fraction of a second; what was not answered for so long never will be.
_MOST_SECONDS = 10.0
_LOOK_SECONDS = 1.0
# A sequence that has tokens, and of which an agent cannot read what it needs, is opened so often, a second
# apart.
_MOST_TRIES = 60
# A request that was there so often in a row may be the cause.
_MOST_LOSSES = 3


class OpenSpans:
    """The spans of one sequence on other agents; an `Elsewhere`.

    Attributes:
      sequence: whose.
      key: of the opening; 0: nothing is open.
      ready: all are open.
      since: clock when something was last sent.
    """

    def __init__(self, home: "Home", sequence: SequenceState):
        self.sequence = sequence
        self.key = 0
        self.ready = False
        self.since = 0.0
        self._home = home
        self._most = _NO_LIMIT
        self._found: dict[int, int] = {}
        self._losses, self._tokens = 0, -1
        self._tries, self._not_before = 0, 0.0

    @property
    def waits(self) -> bool:
        """For an answer."""
        item = self.sequence.item
        return not self.ready or (item is not None and item.is_away)

    def open(self, found: int) -> None:
        """See `Elsewhere`."""
        now = time.monotonic()
        if not self.key and now >= self._not_before:
            self.key = self._home.new_key(self)
            self.since = now
            sequence, route = self.sequence, self.sequence.route
            request = sequence.request
            message = Open(
                key=self.key,
                model=route.chain.name,
                version=route.chain.version,
                token_ids=(*request.token_ids, *sequence.generated),
                length=sequence.prompt_len + sequence.max_tokens,
                found=min(found, self._most),
                adapter_from=sequence.adapter_from,
                salt=request.cache_salt,
                tenant=request.tenant,
                weight=request.weight,
                priority=request.priority,
            )
            for agent in route.agents:
                self._home.port.send(agent, message)

    def loses(self) -> int:
        """An agent that computed it has ended; returns how often in a row, without a token in between."""
        tokens = len(self.sequence.generated)
        self._losses = self._losses + 1 if tokens == self._tokens else 1
        self._tokens = tokens
        return self._losses

    def may_try_again(self, code: str) -> bool:
        """Whether to open it once more, in a while, though an agent says that it cannot."""
        again = (
            code == "UNAVAILABLE" and bool(self.sequence.generated) and self._tries < _MOST_TRIES
        )
        self._tries += again
        self._not_before = time.monotonic() + _LOOK_SECONDS
        return again

    def opened(self, agent: int, found: int) -> None:
        """An agent has opened its part. Where one has less than others, all begin anew with that: what is
        cached is not written again."""
        self._found[agent] = found
        if self.ready or len(self._found) < len(self.sequence.route.agents):
            return
        least = min(self._found.values())
        if least < max(self._found.values()):
            self.close()
            self._most = least
            self.open(least)
        else:
            self.ready, self.sequence.most_found = True, least
            self._tries = 0

    def close(self, *, poisoned: bool = False) -> None:
        """See `Elsewhere`."""
        if self.key:
            tokens = (*self.sequence.request.token_ids, *self.sequence.generated)
            message = Close(key=self.key, token_ids=tokens, poisoned=poisoned)
            for agent in self.sequence.route.agents:
                self._home.port.send(agent, message)
            self._home.forget(self.key)
        self.key, self.ready, self._found = 0, False, {}
        self._most = self.sequence.most_found = _NO_LIMIT


class Home:
    """What is open on other agents, and what is on its way there.

    Attributes:
      port: leads to them.
    """

    def __init__(
        self,
        port: Port,
        device: Runner,
        sequences: Scheduler,
        stepper: Stepper,
        finish: Callable[..., None],
    ):
        """`finish(sequence, reason, **fields of Output)` ends a sequence."""
        self.port = port
        self._device, self._sequences, self._stepper = device, sequences, stepper
        self._finish = finish
        # No agent takes what is left of a home that was here before for this one's.
        self._keys = itertools.count(1 + (secrets.randbits(32) << 30))
        self._open: dict[int, OpenSpans] = {}
        self._departures = Departures(sequences, self._send)
        self._next_look = 0.0

    def begin(self, sequence: SequenceState) -> None:
        """A sequence has come."""
        if sequence.route.agents:
            sequence.elsewhere = OpenSpans(self, sequence)

    def new_key(self, spans: OpenSpans) -> int:
        """Names an opening."""
        key = next(self._keys)
        self._open[key] = spans
        return key

    def forget(self, key: int) -> None:
        """An opening is over; what still comes for it is dropped."""
        del self._open[key]
        self._departures.forget(key)

    def opened(self, agent: int, message: Opened) -> None:
        """An agent has opened a span. Of one that is not wanted any more it has not heard."""
        if (spans := self._open.get(message.key)) is not None:
            spans.opened(agent, message.found)
        else:
            self.port.send(agent, Close(key=message.key, token_ids=(), poisoned=False))

    def closed(self, message: Closed) -> None:
        """An agent has lost a span: the sequence begins anew everywhere, or ends where that would not
        help."""
        spans = self._open.get(message.key)
        if spans is None:
            return
        if message.code and not spans.may_try_again(message.code):
            fields = {"error_code": message.code, "error_message": message.message}
            self._finish(spans.sequence, "error", **fields)
        else:
            self._begin_anew(spans)

    def gone(self, agent: int) -> None:
        """An agent has forgotten all."""
        for spans in [s for s in self._open.values() if agent in s.sequence.route.agents]:
            if spans.ready and spans.loses() >= _MOST_LOSSES:
                words = (
                    f"agents ended {_MOST_LOSSES} times in a row while they computed this request, before it "
                    "got a token; their logs say how"
                )
                fields = {"error_code": "INTERNAL", "error_message": words}
                self._finish(spans.sequence, "error", **fields)
            else:
                self._begin_anew(spans)

    def _begin_anew(self, spans: OpenSpans) -> None:
        """A sequence opens its spans once more when its turn comes, and computes its tokens anew."""
        if spans.sequence.seq_slot >= 0:
            self._sequences.preempt(spans.sequence)
        else:
            spans.close()

    def expire(self, now: float) -> None:
        """Gives up what takes too long: a message was lost, or agents wait for each other's pages."""
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for spans in [s for s in self._open.values() if s.waits and now > s.since + _MOST_SECONDS]:
            names = ", ".join(map(str, spans.sequence.route.agents))
            logging.warning(
                "request %s heard nothing from agents %s for %.0f s and begins anew there",
                spans.sequence.request.request_id,
                names,
                now - spans.since,
            )
            self._begin_anew(spans)

    def leave(self, hop: Hop, items: Sequence[WorkItem]) -> None:
        """Sends items to the agent that has their next blocks; of prompts as many in one message as a grid
        holds, for what comes alone is computed alone."""
        decode: dict[int, WorkItem] = {}
        chunks: dict[int, list[WorkItem]] = collections.defaultdict(list)
        now = time.monotonic()
        for item in items:
            spans = self._spans(item)
            item.is_away, spans.since = True, now
            if item.chunk == 1:
                decode[spans.key] = item
            else:
                chunks[item.chunk].append(item)
        for chunk, same in sorted(chunks.items()):
            size = max((b.num_seqs for b in self._device.buckets if b.q_len == chunk), default=1)
            for at in range(0, len(same), size):
                self._send(hop, same[at : at + size])
        if decode:
            self._departures.leave(hop, decode)

    def go_on(self) -> None:
        """Once a step: nothing is kept for what does not come."""
        self._departures.look()

    def _send(self, hop: Hop, items: Sequence[WorkItem]) -> None:
        assert hop.agent is not None
        now = time.monotonic()
        for item in items:
            self._spans(item).since = now
        values = registers.take(self._device, hop.width, [r for i in items for r in i.rows])
        message = Rows(width=hop.width, items=tuple(map(self._described, items)))
        self.port.send(hop.agent, message, values)

    @staticmethod
    def _spans(item: WorkItem) -> OpenSpans:
        spans = item.sequence.elsewhere
        assert isinstance(spans, OpenSpans)
        return spans

    def _described(self, item: WorkItem) -> RowItem:
        return RowItem(
            key=self._spans(item).key,
            span=item.stage.span,
            start=item.start,
            q_len=item.q_len,
            chunk=item.chunk,
        )

    def arrive(self, agent: int, message: Rows, values: Any) -> None:
        """Takes rows back that an agent has computed. Those that nobody waits for are dropped."""
        rows: list[int] = []
        back: list[WorkItem] = []
        for row_item in message.items:
            item = self._away(agent, row_item)
            if item is None:
                rows += [self._device.num_rows] * row_item.q_len
            else:
                rows += item.rows
                item.is_away = False
                self._departures.forget(row_item.key)
                back.append(item)
        if back:
            registers.put(self._device, message.width, rows, values)
            self._stepper.pass_on(Batch(Bucket(len(back), 1), tuple(back)))

    def _away(self, agent: int, row_item: RowItem) -> WorkItem | None:
        """The item that these rows are of, if it is waited for."""
        spans = self._open.get(row_item.key)
        item = spans.sequence.item if spans else None
        if item is None or not item.is_away:
            return None
        stage = item.stage
        sent = (agent, row_item.span, row_item.start, row_item.q_len)
        hop = stage.instance
        assert isinstance(hop, Hop)
        return item if sent == (hop.agent, stage.span, item.start, item.q_len) else None
