"""Tokens for free where the device has room: drafted ones are verified as rows of the next decoding step.

A sequence that decodes brings the row of its last token. Behind it stand the rows of tokens that are drafted
to follow, each on the grid of decoding with everybody else's, and each samples as if it had come alone: with
the draw of its own position. So what a row picks is what the model would have picked there, greedy or not,
if the tokens before it are what was drafted; as soon as they are read that is known, and rows that followed
from something else are dropped. This is rejection sampling (arXiv 2211.17192) for drafts that are certain of
themselves, and more than equal in distribution: every token is the one that would have come without.

Nothing is rolled back: a sequence goes on at the position behind its last token, and overwrites the KV
there. Pages can be found by others only up to what was read.

Drafts need the tokens that came last. While some are worth their rows the step before is read before the
next is planned; otherwise steps run ahead as ever.
"""

import collections
import dataclasses
import math
import weakref
from collections.abc import Sequence

from jblock.engine.graph.graph import BlockInstance, Route
from jblock.engine.runner.latency_profile import Pace, Profile
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Step
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import SequenceState, WorkItem
from jblock.engine.scheduling.step_budget import Times
from jblock.engine.speculation.lengths import Acceptance, Proposal, StepTime, choose, least_rate
from jblock.engine.speculation.ngrams import Match, NgramIndex
from jblock.pallas_kernels.paged_attention.api import backend_of, joins_rows

# How likely the next token is the drafted one, before it is known of a sequence, by how many tokens in front
# of it agree: 2, up to 4, more.
_ASSUMED = ((2, 0.2), (4, 0.4), (math.inf, 0.7))
# Seconds for which the device rests between reading a step and the next: what enqueuing takes. Before it is
# known, and what a newer one counts.
_FIRST_PAUSE, _WEIGHT, _PAUSES = 1e-3, 0.1, 1.3
# Tokens that a step takes into one sequence's index, at most: half a millisecond.
_INDEXED = 1024


class Drafter:
    """What is known of one sequence's drafts."""

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._rates = [Acceptance(assumed) for _, assumed in _ASSUMED]
        self._expected: tuple[int, int, Acceptance] | None = None

    def look(self, sequence: SequenceState, most: int) -> tuple[Match, Acceptance] | None:
        """Drafts what follows the tokens read so far, and learns from what came of its last look if nobody
        verified that."""
        index, prompt = self._index, sequence.request.token_ids
        at, behind = len(index), len(index) - len(prompt)
        if behind < 0:
            index.extend(prompt[at : at + _INDEXED])
        else:
            index.extend(sequence.generated[behind : behind + _INDEXED])
        if len(index) < len(prompt) + len(sequence.generated):
            return None
        if self._expected and self._expected[0] < len(index):
            place, token, rate = self._expected
            rate.note(int(sequence.generated[place - len(prompt)] == token), 1)
            self._expected = None
        match = index.draft(most)
        if match is None:
            return None
        rate = next(
            r for r, (up_to, _) in zip(self._rates, _ASSUMED, strict=True) if match.length <= up_to
        )
        self._expected = len(index), match.tokens[0], rate
        return match, rate

    def verified(self) -> None:
        """What the last look brought is on its way: its outcome is noted by who sent it."""
        self._expected = None


@dataclasses.dataclass(frozen=True)
class _Sent:
    """Drafts on their way.

    Attributes:
      sequence: whose.
      known: tokens it had generated.
      drafted: how many tokens.
      rate: to learn from what comes of them.
    """

    sequence: SequenceState
    known: int
    drafted: int
    rate: Acceptance


@dataclasses.dataclass(frozen=True)
class _Load:
    """What decodes in a step.

    Attributes:
      routes: of each row.
      counts: rows by route.
      step: what it takes.
    """

    routes: list[Route] = dataclasses.field(default_factory=list)
    counts: collections.Counter[Route] = dataclasses.field(default_factory=collections.Counter)
    step: StepTime = dataclasses.field(default_factory=StepTime)


class Speculation:
    """That of one loop.

    Attributes:
      drafted: tokens that were verified.
      accepted: those of them that came true.
      sent: drafts on their way.
    """

    def __init__(self, profile: Profile, pace: Pace, sequences: Scheduler, most: int):
        """`most` tokens are drafted at a time for one sequence."""
        self.drafted = self.accepted = 0
        self._profile, self._sequences, self._most = profile, sequences, most
        self.sent: list[_Sent] = []
        self._drafters: weakref.WeakKeyDictionary[SequenceState, Drafter] = (
            weakref.WeakKeyDictionary()
        )
        self._blocks: dict[Route, tuple[Times, ...]] = {}
        self._of_block: dict[BlockInstance, Times | None] = {}
        self._load = _Load()
        self._least: dict[tuple, float] = {}
        self._version = -1
        self._pace, self._pause, self._pause_step = pace, _FIRST_PAUSE, 0

    def reads_first(self, step: Step) -> bool:
        """Whether the step on its way is to be read before the next one is planned: it has drafts in it, or
        the next one should have."""
        self._pause += _WEIGHT * (step.host_seconds - self._pause)
        # In seconds of the profile, and no finer than is worth a new look.
        self._pause_step = round(math.log(self._pause / self._pace.ratio, _PAUSES))
        if self.sent:
            return True
        decoding = [s for s in self._sequences.running.values() if s.computed >= s.prefill]
        self._take_load([s.route for s in decoding])
        return self._may_pay and any(self._look(s) is not None for s in decoding)

    def learn(self) -> None:
        """Call it when all that is on its way was read."""
        waiting = []
        for sent in self.sent:
            sequence = sent.sequence
            if sequence.item is not None and sequence.verifying:
                waiting.append(sent)  # held by a full block
                continue
            accepted = max(len(sequence.generated) - sent.known - 1, 0)
            sent.rate.note(min(accepted, sent.drafted), sent.drafted)
            self.drafted += sent.drafted
            self.accepted += accepted
            sequence.verifying = False
        self.sent = waiting

    def add_drafts(self, items: Sequence[WorkItem], budget: float) -> list[WorkItem]:
        """The items of a step with rows of drafts behind those of the sequences that decode.

        Args:
          items: planned; all tokens that were on their way are read.
          budget: seconds of the step, by the profile.
        """
        rows = [item for item in items if item.chunk == 1 and not item.of_prompt]
        self._take_load([item.sequence.route for item in rows])
        if not self._may_pay:
            return list(items)
        found: dict[WorkItem, tuple[Match, Acceptance]] = {}
        for item in rows:
            look = self._look(item.sequence)
            if look is not None:
                found[item] = look
        if not found:
            return list(items)
        step = StepTime()
        for item in rows:
            step.add(self._times(item.sequence.route))
        drafts = []
        for item, (match, rate) in found.items():
            left = item.sequence.max_tokens - len(item.sequence.generated) - 1
            blocks = self._times(item.sequence.route)
            drafts.append(Proposal(blocks, rate.rate, min(len(match.tokens), left)))
        # Rows that prompts need are left to them.
        room = max(self._sequences.rows.num_free // 2, 0)
        lengths = choose(drafts, step, len(rows), room, budget)
        sent = {
            item: self._send(item, match, rate, count)
            for (item, (match, rate)), count in zip(found.items(), lengths, strict=True)
            if count
        }
        return [one for item in items for one in sent.get(item, (item,))]

    def _send(
        self, item: WorkItem, match: Match, rate: Acceptance, count: int
    ) -> tuple[WorkItem, ...]:
        """The rows of a sequence: that of its last token, and those of its drafts."""
        sequence, start = item.sequence, item.start
        while count and not self._sequences.kv.grow(sequence.pages, start + 1 + count):
            count -= 1
        if not count:
            return (item,)
        tokens = match.tokens[:count]
        drafts = tuple(
            WorkItem(sequence, start + n, 1, 1, [row], (tokens[n - 1],), True, drafted=tokens[:n])
            for n, row in enumerate(self._sequences.rows.allocate(count), 1)
        )
        last = (sequence.generated[-1],)
        lead = WorkItem(sequence, start, 1, 1, [sequence.row], last, True, drafts=drafts)
        sequence.item, sequence.verifying, sequence.last_on_device = lead, True, False
        self._drafters[sequence].verified()
        self.sent.append(_Sent(sequence, len(sequence.generated), count, rate))
        return (lead, *drafts)

    @staticmethod
    def _may(sequence: SequenceState) -> bool:
        """Whether drafts could be verified: what each row may pick is known when it is enqueued."""
        return (
            sequence.constraint is None
            and sequence.guest is None
            and sequence.elsewhere is None
            and len(sequence.generated) > 0
        )

    def _look(self, sequence: SequenceState) -> tuple[Match, Acceptance] | None:
        """What may follow a sequence's tokens, if at this load it may be worth verifying."""
        least = self._least_rate(sequence.route)
        if least > 1 or not self._may(sequence):
            return None
        drafter = self._drafters.get(sequence)
        if drafter is None:
            drafter = self._drafters[sequence] = Drafter()
        found = drafter.look(sequence, self._most)
        if found is None or found[1].rate < least:
            return None
        return found

    def _take_load(self, routes: list[Route]) -> None:
        """Takes up which rows decode; mostly the same as in the last step."""
        if self._version != self._profile.version:
            self._version = self._profile.version
            self._blocks.clear()
            self._of_block.clear()
        elif routes == self._load.routes:
            return
        step, counts = StepTime(), collections.Counter(routes)
        for route, count in counts.items():
            step.add(self._times(route), count)
        self._load = _Load(routes, counts, step)
        self._least.clear()

    @property
    def _may_pay(self) -> bool:
        """Whether at this load drafts that are sure to come true would be worth it on some route."""
        return any(self._least_rate(route) <= 1 for route in self._load.counts)

    def _least_rate(self, route: Route) -> float:
        """See `lengths.least_rate`."""
        key = route, self._pause_step
        if key not in self._least:
            load, blocks = self._load, self._times(route)
            self._least[key] = math.inf
            if blocks:
                counts = load.counts[route], len(load.routes), self._most
                pause = _PAUSES**self._pause_step
                self._least[key] = least_rate(load.step, blocks, *counts, pause)
        return self._least[key]

    def _times(self, route: Route) -> tuple[Times, ...]:
        """Of the blocks of a route; () where one is not measured."""
        if route not in self._blocks:
            for instance in route.instances:
                if instance not in self._of_block:
                    self._of_block[instance] = self._profile.decode_times(instance)
            times = [self._of_block[i] for i in route.instances]
            known = [t for t in times if t is not None]
            self._blocks[route] = tuple(known) if len(known) == len(times) else ()
        return self._blocks[route]


def speculation_of(
    device: Runner, profile: Profile, pace: Pace, sequences: Scheduler
) -> Speculation | None:
    """That of a device; None where it is off, or rows of a decoding grid cannot be neighboring tokens of one
    sequence: the kernels of TPUs and Hopper GPUs bring a row's KV while another's is written, and groups of
    devices share rows out."""
    placement, most = device.placement, device.config.max_draft_tokens
    joins = joins_rows(backend_of(placement.platform.name))
    can = most and joins and placement.rules.ways("rows") == 1
    return Speculation(profile, pace, sequences, most) if can else None
