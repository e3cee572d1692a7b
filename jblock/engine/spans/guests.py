"""Spans that lie on this agent of sequences whose home is another one."""

import collections
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jblock.engine.api import Request, SamplingParams
from jblock.engine.graph.graph import Hop, Route
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Stepper
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import SequenceState, WorkItem
from jblock.engine.spans import rows as registers
from jblock.engine.spans.messages import Close, Closed, Open, Opened, RowItem, Rows
from jblock.engine.spans.port import Port
from jblock.engine.weights.cache import WeightCache

Key = tuple[int, int]
"""The home's number and the key of its opening."""


# A home that says nothing for so long may have forgotten the span, and what said so was lost.
_SILENT_SECONDS = 10.0
_LOOK_SECONDS = 1.0


class GuestSpan:
    """One of them; a `Guest`.

    Attributes:
      key: of its opening.
      heard: clock when its home last said something of it.
      ends: of each span, where the rows end that came for it last.
    """

    def __init__(self, guests: "Guests", key: Key):
        self.key = key
        self.heard = time.monotonic()
        self.ends: dict[int, int] = {}
        self._guests = guests
        self._found = -1

    def admit(self, found: int) -> None:
        """See `Guest`."""
        self._found = found
        self.ask()

    def ask(self) -> None:
        """Tells its home that it is open, if it is. One that has forgotten it says so."""
        self.heard = time.monotonic()
        if self._found >= 0:
            home, key = self.key
            self._guests.port.send(home, Opened(key=key, found=self._found))

    def end(self, code: str = "", message: str = "") -> None:
        """See `Guest`."""
        self._guests.forget(self.key)
        home, key = self.key
        self._guests.port.send(home, Closed(key=key, code=code, message=message))


class Guests:
    """All of them. They wait and run beside the agent's own sequences; what is to be computed comes from
    their homes.

    Attributes:
      port: leads to those.
    """

    def __init__(
        self,
        port: Port,
        device: Runner,
        sequences: Scheduler,
        stepper: Stepper,
        weight_cache: WeightCache,
    ):
        self.port = port
        self._device, self._sequences, self._stepper = device, sequences, stepper
        self._weight_cache = weight_cache
        self._open: dict[Key, SequenceState] = {}
        self._next_look = 0.0

    def expire(self, now: float) -> None:
        """Asks homes that say nothing of what is open here: a message may have been lost."""
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for sequence in self._open.values():
            guest = _guest(sequence)
            if now > guest.heard + _SILENT_SECONDS:
                guest.ask()

    def open(self, home: int, message: Open, routes: Mapping[str, Route]) -> None:
        """Lets a span wait for pages, or refuses it."""
        key = (home, message.key)
        if key in self._open:
            return
        route = routes.get(message.model)
        if route is None or route.chain.version != message.version:
            words = f"model {message.model!r} is not served in version {message.version} any more"
            self._refuse(key, "ABORTED", f"{words}; send the request again")
            return
        limit = self._device.max_model_len(route) + route.virtual_tokens
        if message.length > limit:
            remedy = self._device.limit_remedy(route)
            words = f"the request may come to {message.length} tokens, an agent's KV holds {limit}"
            self._refuse(key, "INVALID_ARGUMENT", f"{words}; {remedy}")
            return
        sequence = SequenceState(
            request=Request(
                request_id=f"{home}/{message.key}",
                model=message.model,
                token_ids=message.token_ids,
                sampling=SamplingParams(temperature=0.0),
                cache_salt=message.salt,
                tenant=message.tenant,
                weight=message.weight,
                priority=message.priority,
            ),
            route=route,
            max_tokens=message.length,
            seed=0,
            lease=self._weight_cache.acquire(route.needs),
            most_found=message.found,
            adapter_from=message.adapter_from,
            guest=GuestSpan(self, key),
        )
        self._open[key] = sequence
        self._sequences.add(sequence)

    def _refuse(self, key: Key, code: str = "", message: str = "") -> None:
        home, own = key
        self.port.send(home, Closed(key=own, code=code, message=message))

    def close(self, home: int, message: Close) -> None:
        """A home wants a span no more."""
        sequence = self._open.get((home, message.key))
        if sequence is not None:
            sequence.generated = list(message.token_ids[len(sequence.request.token_ids) :])
            self._sequences.end(sequence, poisoned=message.poisoned)
            self.forget((home, message.key))

    def gone(self, home: int) -> None:
        """A home has forgotten its sequences."""
        for key in [key for key in self._open if key[0] == home]:
            self._sequences.end(self._open[key], poisoned=False)
            self.forget(key)

    def forget(self, key: Key) -> None:
        """A span that holds nothing any more."""
        sequence = self._open.pop(key)
        sequence.finished = True
        self._weight_cache.release(sequence.lease)

    def arrive(self, home: int, message: Rows, values: Any) -> bool:
        """Takes rows for some spans. False: not yet, for there are no registers for them, or no programs on
        their grid; nothing changed."""
        grids = {bucket.q_len for bucket in self._device.buckets}
        known = [self._waits_for(home, item) for item in message.items]
        wanted = sum(i.q_len - 1 for i, s in zip(message.items, known, strict=True) if s)
        if wanted > self._sequences.rows.num_free or any(
            i.chunk not in grids for i in message.items
        ):
            return False
        made: list[tuple[RowItem, WorkItem | None]] = []
        for row_item, sequence in zip(message.items, known, strict=True):
            item = None
            if sequence is not None and self._make_room(sequence, row_item):
                item = self._item(sequence, row_item)
                sequence.item = item
                self._stepper.queues.add([item])
            made.append((row_item, item))
        rows: list[int] = []
        for row_item, item in made:
            # One that came before may have given its pages to one that came after.
            there = item is not None and item.sequence.item is item
            rows += item.rows if item and there else [self._device.num_rows] * row_item.q_len
        registers.put(self._device, message.width, rows, values)
        return True

    def _waits_for(self, home: int, row_item: RowItem) -> SequenceState | None:
        """The sequence that these rows go on with; a home that thinks one open that is not is told so."""
        sequence = self._open.get((home, row_item.key))
        if sequence is None:
            self._refuse((home, row_item.key))
            return None
        first = _guest(sequence).ends.get(row_item.span, 0)  # what came twice is dropped
        fits = (
            sequence.seq_slot >= 0
            and sequence.item is None
            and row_item.span < len(sequence.route.span_starts)
            and 0 < row_item.q_len <= row_item.chunk
            and first <= row_item.start <= sequence.max_tokens - row_item.q_len
        )
        return sequence if fits else None

    def _make_room(self, sequence: SequenceState, row_item: RowItem) -> bool:
        if sequence.seq_slot < 0:
            return False
        return self._sequences.make_room(sequence, row_item.start + row_item.q_len)

    def _item(self, sequence: SequenceState, row_item: RowItem) -> WorkItem:
        guest = _guest(sequence)
        guest.heard = time.monotonic()
        guest.ends[row_item.span] = row_item.start + row_item.q_len
        return WorkItem(
            sequence=sequence,
            start=row_item.start,
            q_len=row_item.q_len,
            chunk=row_item.chunk,
            rows=[sequence.row, *self._sequences.rows.allocate(row_item.q_len - 1)],
            tokens=(),
            samples=False,
            at=sequence.route.span_starts[row_item.span],
        )

    def leave(self, hop: Hop, items: Sequence[WorkItem]) -> None:
        """Sends items home, as they come to the end of a span: decoding rows do not wait for prompts."""
        groups: dict[tuple[int, bool], list[WorkItem]] = collections.defaultdict(list)
        for item in items:
            groups[_guest(item.sequence).key[0], item.chunk > 1].append(item)
        for (home, _), group in groups.items():
            values = registers.take(self._device, hop.width, [r for i in group for r in i.rows])
            described = tuple(map(_described, group))
            for item in group:
                self._pass(item)
            self.port.send(home, Rows(width=hop.width, items=described, back=True), values)

    def _pass(self, item: WorkItem) -> None:
        """An item has passed a span; behind the last one its KV is complete."""
        sequence, end = item.sequence, item.start + item.q_len
        if item.at < len(sequence.route.stages) - 1:
            self._stepper.end(item)
            return
        sequence.computed = min(end, sequence.prefill)
        if end >= sequence.prefill:
            sequence.sampled = end - sequence.prompt_len + 1
        self._stepper.complete(item)


def _guest(sequence: SequenceState) -> GuestSpan:
    guest = sequence.guest
    assert isinstance(guest, GuestSpan)
    return guest


def _described(item: WorkItem) -> RowItem:
    route = item.sequence.route
    return RowItem(
        key=_guest(item.sequence).key[1],
        span=max(n for n, at in enumerate(route.span_starts) if at <= item.at),
        start=item.start,
        q_len=item.q_len,
        chunk=item.chunk,
    )
