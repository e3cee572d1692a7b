"""Who waits, who runs, what the running ones hold, and what each does in the next step. Knows no device."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from jblock.engine.config import EngineConfig
from jblock.engine.graph.graph import Route
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.scheduling.sequence import SequenceState, WorkItem, chunk_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the scheduler has to know of the device now.

    Attributes:
      greedy_only: other requests wait for programs.
      rates: of copies and prefill; None: not measured, nothing is offloaded.
      chunks: lengths a prompt may be cut into, ascending.
      chunk_seconds: of one chunk of a length along a route; None if not known.
    """

    greedy_only: bool
    rates: Rates | None
    chunks: Sequence[int]
    chunk_seconds: Callable[[Route, int], float | None]


# Steps after which twice as many sequences may run, where the device had no memory for all.
_STEPS_TO_DOUBLE = 64


class Scheduler:
    """The sequences of one agent.

    Attributes:
      waiting: in the order they are to start.
      running: by request id, in the order they started.
      rows: register rows.
      kv: pages.
      preemptions: sequences preempted to free pages.
      offloads: those whose pages were copied to the host.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv: KVCacheManager,
        num_rows: int,
        withdraw: Callable[[WorkItem], None],
    ):
        """Nothing waits or runs.

        Args:
          config: of the agent.
          kv: pages, none of them owned.
          num_rows: of each register.
          withdraw: takes an item out of the queues of blocks.
        """
        self.waiting: collections.deque[SequenceState] = collections.deque()
        self.running: dict[str, SequenceState] = {}
        self.rows = IdAllocator(num_rows)
        self.kv = kv
        self.preemptions = self.offloads = 0
        self._max_running = self._most_running = config.max_num_seqs
        self._steps = 0
        self._withdraw = withdraw
        self._waiting_by_id: dict[str, SequenceState] = {}
        self._seq_slots = IdAllocator(config.max_num_seqs)
        self._rates: Rates | None = None

    def __iter__(self) -> Iterator[SequenceState]:
        """All sequences that have not ended, running ones first."""
        yield from self.running.values()
        yield from self.waiting

    def find(self, request_id: str) -> SequenceState | None:
        """The open sequence of a request."""
        return self.running.get(request_id) or self._waiting_by_id.get(request_id)

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence."""
        self.waiting.append(sequence)
        self._waiting_by_id[sequence.request.request_id] = sequence

    @property
    def prompts_in_flight(self) -> list[WorkItem]:
        """Chunks of prompts on their way through the blocks, those of the oldest sequence first."""
        items = (s.item for s in self.running.values())
        return [item for item in items if item is not None and item.chunk > 1]

    def admit(self, machine: Machine) -> None:
        """Starts waiting requests in order. One that lacks pages holds back only those that want pages of
        the same shape; one whose prompt begins as a prompt being computed waits for it, and one that
        needs programs still being made, or a chain still being read, waits for that alone."""
        self._rates = machine.rates
        if not self.waiting:
            return
        held: set[KVShape] = set()
        prefilling = [s.prompt_work for s in self.running.values() if s.computed < s.prefill]
        begin = min(prefilling, default=0.0)
        started: list[SequenceState] = []
        for sequence in self.waiting:
            if not self._seq_slots.num_free or not self.rows.num_free:
                break
            if len(self.running) >= self._max_running:
                break
            # The cheapest questions first: hundreds may wait for one thing.
            if held and not held.isdisjoint(sequence.pages.layers):
                continue
            if not sequence.lease.ready or (machine.greedy_only and not sequence.greedy_only):
                continue
            tokens, limit = sequence.all_token_ids, sequence.shareable_tokens
            if self.kv.prefix_in_flight(sequence.pages, tokens, limit):
                continue
            (slot,) = self._seq_slots.allocate(1)
            computed = self.kv.admit(sequence.pages, slot, tokens, limit)
            if computed is None:
                self._seq_slots.free([slot])
                held.update(sequence.pages.layers)
                continue
            sequence.seq_slot, sequence.computed = slot, computed
            sequence.adapter_slot = sequence.lease.slot
            (sequence.row,) = self.rows.allocate(1)
            sequence.prefill = len(tokens)
            sequence.sampled = len(sequence.generated)
            sequence.prompt_work = begin
            self.running[sequence.request.request_id] = sequence
            started.append(sequence)
        for sequence in started:
            self._leave_queue(sequence)

    def schedule(self, machine: Machine, prompt_seconds: float = math.inf) -> list[WorkItem]:
        """The next unit of work for each idle sequence: one decode token, or the next chunk of its prompt.

        Decoding goes first. Prompts in flight share the time for prompts evenly: the next chunk is that of
        the prompt that was given least, a new one beginning level with the least of the others; so a short
        prompt waits for chunks that were begun, and never for the whole of a long one. Chunks are begun as
        long as those on their way fit the time and rows are free, so a step's tokens have a bound. Where a
        prompt is cut does not depend on any of this.

        Args:
          machine: what there is to run on.
          prompt_seconds: what chunks may take in one step.
        """
        self._rates = machine.rates
        items: list[WorkItem] = []
        prefilling = []
        for sequence in list(self.running.values()):
            if sequence.seq_slot < 0:
                continue  # preempted a moment ago
            if sequence.item is not None:
                continue
            if sequence.computed < sequence.prefill:
                prefilling.append(sequence)
            elif sequence.sampled < sequence.max_tokens:
                start = sequence.prompt_len + sequence.sampled - 1
                if self.make_room(sequence, start + 1):
                    items.append(WorkItem(sequence, start, 1, 1, [sequence.row], (), True))
                    sequence.sampled += 1
        room = prompt_seconds - sum(item.seconds_left for item in self.prompts_in_flight)
        for sequence in sorted(prefilling, key=lambda s: s.prompt_work):
            if sequence.seq_slot < 0:
                continue
            start = sequence.computed
            length, chunk = chunk_for(sequence.prefill - start, tuple(machine.chunks))
            if start >= sequence.prompt_len and sequence.prefill - start == 1:
                # What an offload leaves to compute: the token it was about to decode, on the same grid.
                length = chunk = 1
            if room <= 0 or length - 1 > self.rows.num_free:
                break
            seconds = machine.chunk_seconds(sequence.route, chunk) or 0.0
            room -= seconds
            sequence.prompt_work += seconds
            items.append(self._chunk(sequence, length, chunk, seconds))
        return items

    def _chunk(self, sequence: SequenceState, length: int, chunk: int, seconds: float) -> WorkItem:
        start = sequence.computed
        rows = [sequence.row, *self.rows.allocate(length - 1)]
        tokens = sequence.all_token_ids[start : start + length]
        sequence.computed += length
        samples = sequence.computed == sequence.prefill
        sequence.sampled += samples
        scores = sequence.scores_prompt
        item = WorkItem(sequence, start, length, chunk, rows, tokens, samples, scores)
        item.seconds_left = seconds
        return item

    def make_room(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Pages for one more token of a sequence; under pressure the youngest sequences with pages of its
        shapes are preempted until there is room again. False: it was the youngest itself."""
        shapes = sequence.pages.layers.keys()
        while not self.kv.grow(sequence.pages, num_tokens):
            rivals = [s for s in self.running.values() if not shapes.isdisjoint(s.pages.layers)]
            self.preempt(rivals[-1])
            if rivals[-1] is sequence:
                return False
        return True

    def free_pages(self, shape: KVShape, count: int) -> None:
        """Preempts the youngest sequences until a pool would do with so many pages."""
        pool = self.kv.pools.get(shape)
        while pool is not None and pool.total - pool.num_free > count:
            self.preempt([s for s in self.running.values() if shape in s.pages.layers][-1])

    def end(self, sequence: SequenceState, *, poisoned: bool) -> None:
        """Forgets a sequence and takes back all it held; what a poisoned one computed is not found again."""
        if poisoned:
            self.kv.invalidate(sequence.pages)
        if sequence.request.request_id in self.running:
            self._release(sequence, cache=not poisoned)
        elif sequence.request.request_id in self._waiting_by_id:
            self._leave_queue(sequence)
            self.kv.drop_copy(sequence.pages)

    def preempt(self, sequence: SequenceState) -> None:
        """Takes all a sequence holds and puts it first in the queue. Its pages go to the host where
        that is cheaper than computing them anew and there is room; its prefix stays cached besides
        for as long as nobody wants the pages."""
        self.preemptions += 1
        self._withdraw_item(sequence)
        written, rates, pages = _written(sequence), self._rates, sequence.pages
        if rates and rates.offload_pays(self.kv.copy_bytes(pages, written), written):
            self.offloads += self.kv.offload(pages, written)
        self._release(sequence, cache=True)
        self.waiting.appendleft(sequence)
        self._waiting_by_id[sequence.request.request_id] = sequence

    def note_step(self) -> None:
        """After a step for which there was memory: from time to time more sequences may run again."""
        self._steps += 1
        if self._steps % _STEPS_TO_DOUBLE == 0:
            self._max_running = min(2 * self._max_running, self._most_running)

    def start_over(self) -> list[SequenceState]:
        """Preempts every running sequence and keeps nothing of what it computed: a step failed half way, and
        what it wrote is not known. Half as many run from now on.

        Returns:
          Those that ran, oldest first.
        """
        running = list(self.running.values())
        for sequence in reversed(running):
            self.preemptions += 1
            self.kv.invalidate(sequence.pages)
            self._release(sequence, cache=False)
            self.waiting.appendleft(sequence)
            self._waiting_by_id[sequence.request.request_id] = sequence
        self._max_running, self._steps = max(1, len(running) // 2), 0
        return running

    def _release(self, sequence: SequenceState, *, cache: bool) -> None:
        """Gives back the pages, row and slot of a running sequence."""
        self._withdraw_item(sequence)
        del self.running[sequence.request.request_id]
        written = _written(sequence)
        if cache and self.kv.has_uncached(sequence.pages, written):
            self.kv.cache(sequence.pages, sequence.all_token_ids, written)
        self.kv.release(sequence.pages)
        self.rows.free([sequence.row])
        self._seq_slots.free([sequence.seq_slot])
        sequence.seq_slot = sequence.row = -1
        sequence.computed = 0

    def _withdraw_item(self, sequence: SequenceState) -> None:
        """Takes back what a sequence has on its way, wherever it waits: as if it had not been scheduled."""
        item = sequence.item
        if item is None:
            return
        self._withdraw(item)
        self.rows.free(item.rows[1:])
        sequence.item = None
        sequence.sampled -= item.samples
        if item.of_prompt:
            sequence.computed = item.start

    def _leave_queue(self, sequence: SequenceState) -> None:
        self.waiting.remove(sequence)
        del self._waiting_by_id[sequence.request.request_id]


def _written(sequence: SequenceState) -> int:
    """How many of a running sequence's first tokens have their KV enqueued, as far as known."""
    if sequence.computed < sequence.prefill:
        return sequence.computed
    return min(sequence.prompt_len + sequence.sampled - 1, sequence.num_tokens)
