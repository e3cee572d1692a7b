"""Who waits, who runs, what the running ones hold, and what each does in the next step. Knows no device."""

import collections
import math
from collections.abc import Callable, Iterator

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.scheduling import fairness
from jblock.engine.scheduling.fairness import VirtualTokenCounter, WaitingQueue
from jblock.engine.scheduling.machine import Machine
from jblock.engine.scheduling.sequence import SequenceState, WorkItem, chunk_for

# Sequences that may be preempted at a time so that a tenant with nothing running begins.
_MOST_YIELD = 8
# Steps after which twice as many sequences may run, where the device had no memory for all.
_STEPS_TO_DOUBLE = 64


class Scheduler:
    """The sequences of one agent.

    Attributes:
      waiting: in a line for each tenant.
      counter: what each tenant was served.
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
        counter: VirtualTokenCounter | None = None,
    ):
        """Nothing waits or runs.

        Args:
          config: of the agent.
          kv: pages, none of them owned.
          num_rows: of each register.
          withdraw: takes an item out of the queues of blocks.
          counter: where other schedulers have the same one.
        """
        self.waiting = WaitingQueue()
        self.counter = counter or VirtualTokenCounter()
        self.running: dict[str, SequenceState] = {}
        self.rows, self.kv = IdAllocator(num_rows), kv
        self.preemptions = self.offloads = 0
        self._max_running = self._most_running = config.max_num_seqs
        self._steps, self._page_size, self._withdraw = 0, config.page_size, withdraw
        self._prompt_clocks: dict[str, float] = {}
        self._seq_slots = IdAllocator(config.max_num_seqs)
        self._rates: Rates | None = None

    def __iter__(self) -> Iterator[SequenceState]:
        """All sequences that have not ended, running ones first."""
        yield from self.running.values()
        yield from self.waiting

    def find(self, request_id: str) -> SequenceState | None:
        """The open sequence of a request."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence."""
        self.counter.arrive(sequence.request.tenant, sequence.request.weight)
        self.waiting.add(sequence)

    @property
    def prompts_in_flight(self) -> list[WorkItem]:
        """Chunks of prompts on their way through the blocks, those of the oldest sequence first."""
        running = self.running.values()
        return [i for s in running if (i := s.item) and i.chunk > 1 and not i.is_away]

    def admit(self, machine: Machine) -> None:
        """Starts waiting requests, those of the tenant that was served least first. One that lacks pages
        holds back only those that want pages of the same shape; one whose prompt begins as a prompt being
        computed waits for it, and one that needs programs still being made, or a chain still being read,
        waits for that alone. A prompt is charged when it starts; what the cache has of it is free."""
        self._rates = machine.rates
        held: set[KVShape] = set()
        opening = 0
        prefilling = [s for s in self.running.values() if s.computed < s.prefill]
        begin = min((s.prompt_work for s in prefilling), default=0.0)
        clocks = {s.request.tenant: 0.0 for s in prefilling}
        self._prompt_clocks = {name: self._prompt_clocks.get(name, 0.0) for name in clocks}
        for sequence in self.waiting.fair_order(self.counter.rank):
            # The cheapest questions first: hundreds may wait for one thing.
            if held and not held.isdisjoint(sequence.pages.layers):
                continue
            if not sequence.lease.ready or (machine.greedy_only and not sequence.greedy_only):
                continue
            if sequence.constraint is not None and not sequence.constraint.ready:
                continue
            tokens, limit = sequence.all_token_ids, sequence.shareable_tokens
            # Agents must not wait for each other: a guest waits for nobody's prefix.
            elsewhere = sequence.elsewhere
            if not sequence.guest and self.kv.prefix_in_flight(sequence.pages, tokens, limit):
                if elsewhere is not None:
                    elsewhere.close()
                continue
            if elsewhere is not None and not elsewhere.ready:
                if opening < self._max_running - len(self.running):
                    elsewhere.open(self.kv.cached_tokens(sequence.pages, tokens, limit))
                    opening += 1
                continue
            computed = self._place(sequence)
            if computed is None:
                if not self._has_slot:
                    break
                held.update(sequence.pages.layers)
                if self.waiting.all_want(held):
                    break
                continue
            if elsewhere is not None and computed != sequence.most_found:
                self._give_back(sequence)  # Less is cached by now than was opened with.
                elsewhere.close()
                continue
            sequence.computed = computed
            sequence.adapter_slot = sequence.lease.slot
            (sequence.row,) = self.rows.allocate(1)
            sequence.prefill = len(tokens)
            sequence.sampled = len(sequence.generated)
            sequence.prompt_work = begin
            tenant = sequence.request.tenant
            least = min(self._prompt_clocks.values(), default=0.0)
            self._prompt_clocks.setdefault(tenant, least)
            self.waiting.remove(sequence)
            self.running[sequence.request.request_id] = sequence
            self.counter.start(tenant)
            sequence.token_seconds = machine.decode_seconds(sequence.route)
            if sequence.guest is not None:
                sequence.guest.admit(computed)
            else:
                self._charge_start(sequence, machine)

    def _charge_start(self, sequence: SequenceState, machine: Machine) -> None:
        """Charges what a sequence has to compute before it decodes. What it computed before it was preempted
        was charged then."""
        begin, prompt_len = max(sequence.computed, sequence.charged), sequence.prompt_len
        generated = max(sequence.prefill - max(begin, prompt_len), 0)
        seconds = machine.prompt_seconds(sequence.route, prompt_len - begin)
        self.counter.charge(sequence.request.tenant, seconds + generated * sequence.token_seconds)
        sequence.charged = max(sequence.charged, sequence.prefill)

    @property
    def _has_slot(self) -> bool:
        """Whether one more sequence may run at all."""
        return (
            len(self.running) < self._max_running
            and self._seq_slots.num_free > 0
            and self.rows.num_free > 0
        )

    def _place(self, sequence: SequenceState) -> int | None:
        """Gives a sequence a slot and pages. For a tenant with nothing running the tenant that was served
        most gives some of its own up, so that it does not wait for the end of long answers.

        Returns:
          How many of its tokens are there already; None: there is no room, nothing changed for it.
        """
        for left in reversed(range(_MOST_YIELD + 1)):
            if self._has_slot:
                (slot,) = self._seq_slots.allocate(1)
                limit = min(sequence.shareable_tokens, sequence.most_found)
                computed = self.kv.admit(sequence.pages, slot, sequence.all_token_ids, limit)
                if computed is not None:
                    sequence.seq_slot = slot
                    return computed
                self._seq_slots.free([slot])
            if not left or not self._yield_to(sequence):
                return None
        return None

    def _yield_to(self, sequence: SequenceState) -> bool:
        """Preempts one sequence for one of a tenant with nothing running, if another has too many."""
        running, any_shape = self.running.values(), not self._has_slot
        rivals = fairness.who_may_yield(self.counter, sequence, running, any_shape=any_shape)
        if rivals:
            self.preempt(fairness.most_served(self.counter, rivals))
        return bool(rivals)

    def schedule(self, machine: Machine, prompt_seconds: float = math.inf) -> list[WorkItem]:
        """The next unit of work for each idle sequence: one decode token, or the next chunk of its prompt.

        Decoding goes first. Tenants with prompts in flight share the time for prompts by weight, and the
        prompts of one its part evenly: the next chunk is that of the prompt that was given least, a new one
        beginning level with the least of the others; so a short prompt waits for chunks that were begun, and
        never for the whole of a long one. Chunks are begun as
        long as those on their way fit the time and rows are free, so a step's tokens have a bound. Where a
        prompt is cut does not depend on any of this.

        Args:
          machine: what there is to run on.
          prompt_seconds: what chunks may take in one step.
        """
        self._rates = machine.rates
        prefilling: list[SequenceState] = []
        items = self._decoding(prefilling)
        room = prompt_seconds - sum(item.seconds_left for item in self.prompts_in_flight)
        for sequence in sorted(prefilling, key=self._prompt_turn):
            if sequence.seq_slot < 0:
                continue
            start = sequence.computed
            entry = sequence.pages.entry(start)
            boundary = sequence.route.boundaries[entry.number] if entry else None
            end = entry.until if entry else sequence.prefill
            if start < sequence.adapter_from < end:
                end = sequence.adapter_from  # A chunk is all without its adapter, or all with it.
            length, chunk = chunk_for(end - start, tuple(machine.chunks))
            if start >= sequence.prompt_len and sequence.prefill - start == 1:
                # What an offload leaves to compute: the token it was about to decode, on the same grid.
                length = chunk = 1
            if room <= 0 or length - 1 > self.rows.num_free:
                break
            seconds = machine.chunk_seconds(sequence.route, chunk, boundary) or 0.0
            room -= seconds
            sequence.prompt_work += seconds
            own = sequence.request
            clock = self._prompt_clocks.get(own.tenant, 0.0)
            self._prompt_clocks[own.tenant] = clock + seconds / own.weight
            item = self._chunk(sequence, length, chunk)
            item.seconds_left = seconds
            if boundary is not None:
                item.entry, item.at = boundary, boundary.stage
            items.append(item)
        return items

    def _decoding(self, prefilling: list[SequenceState]) -> list[WorkItem]:
        """The next token of each sequence that decodes and has nothing on its way; adds to `prefilling` those
        that do not decode yet. A loop over all that run, in every step: little is called in it."""
        items: list[WorkItem] = []
        served: collections.defaultdict[str, float] = collections.defaultdict(float)
        page_size, preemptions = self._page_size, self.preemptions
        for sequence in list(self.running.values()):
            if sequence.item is not None or sequence.seq_slot < 0 or sequence.guest is not None:
                continue  # on its way, preempted a moment ago, or sent by its home
            if sequence.verifying:
                continue  # it is not known yet which tokens it has
            if sequence.constraint is not None and sequence.sits_out:
                continue
            if sequence.computed < sequence.prefill:
                prefilling.append(sequence)
                continue
            if (sampled := sequence.sampled) >= sequence.max_tokens:
                continue
            start = sequence.prompt_len + sampled - 1
            # Pages for one more token; under pressure it may have to give way itself.
            room = sequence.pages.count * page_size
            if start >= room and not self.make_room(sequence, start + 1):
                continue
            item = sequence.decode_item
            if item is None or sequence.constraint is not None or not sequence.last_on_device:
                last = () if sequence.last_on_device else (sequence.generated[-1],)
                item = WorkItem(sequence, start, 1, 1, [sequence.row], last, True)
                keeps = sequence.constraint is None and not last
                sequence.decode_item = item if keeps else None
                sequence.last_on_device = True
            item.start, item.at, sequence.sampled = start, 0, sampled + 1
            sequence.item = item  # its own from now on: it may yet give way to a later one
            items.append(item)
            if start >= sequence.charged:
                more, sequence.charged = start + 1 - sequence.charged, start + 1
                served[sequence.request.tenant] += more * sequence.token_seconds
        for tenant, seconds in served.items():
            self.counter.charge(tenant, seconds)
        gave_way = self.preemptions > preemptions
        return [i for i in items if i.sequence.item is i] if gave_way else items

    def _prompt_turn(self, sequence: SequenceState) -> tuple[int, float, float]:
        clock = self._prompt_clocks.get(sequence.request.tenant, 0.0)
        return sequence.request.priority, clock, sequence.prompt_work

    def _chunk(self, sequence: SequenceState, length: int, chunk: int) -> WorkItem:
        start = sequence.computed
        self.kv.rows.reserve(sequence.pages, start, start + length)
        rows = [sequence.row, *self.rows.allocate(length - 1)]
        tokens = sequence.all_token_ids[start : start + length]
        sequence.computed += length
        samples = sequence.computed == sequence.prefill
        sequence.sampled += samples
        scores = sequence.scores_prompt
        item = WorkItem(sequence, start, length, chunk, rows, tokens, samples, scores)
        item.pools = sequence.request.pooling == "mean" or (
            samples and bool(sequence.request.pooling)
        )
        return item

    def make_room(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Pages for one more token of a sequence; under pressure the youngest sequences of the tenant that
        was served most, with pages of its shapes, are preempted until there is room again. False: it was one
        of them itself."""
        own = sequence.pages.layers
        while not self.kv.grow(sequence.pages, num_tokens):
            pages = ((s, s.pages.layers) for s in self.running.values())
            rivals = [s for s, of in pages if of is own or not own.keys().isdisjoint(of)]
            victim = fairness.most_served(self.counter, rivals)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def end(self, sequence: SequenceState, *, poisoned: bool) -> None:
        """Forgets a sequence and takes back all it held; what a poisoned one computed is not found again."""
        if poisoned:
            self.kv.invalidate(sequence.pages)
        if sequence.request.request_id in self.running:
            self._release(sequence, cache=not poisoned)
            self.counter.end(sequence.request.tenant)
        elif self.waiting.get(sequence.request.request_id) is not None:
            self.waiting.remove(sequence)
            self.counter.withdraw(sequence.request.tenant)
            if sequence.elsewhere is not None:
                sequence.elsewhere.close()
            self.kv.drop_copy(sequence.pages)

    def preempt(self, sequence: SequenceState) -> None:
        """Takes all a sequence holds and puts it first in its tenant's line. Its pages go to the host where
        that is cheaper than computing them anew and there is room; its prefix stays cached besides
        for as long as nobody wants the pages."""
        self.preemptions += 1
        self._withdraw_item(sequence)
        written, rates, pages = sequence.written, self._rates, sequence.pages
        alone = sequence.elsewhere is None and sequence.guest is None
        if alone and rates and rates.offload_pays(self.kv.copy_bytes(pages, written), written):
            self.offloads += self.kv.offload(pages, written)
        self._release(sequence, cache=True)
        self._wait_again(sequence)

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
            self._wait_again(sequence)
        self._max_running, self._steps = max(1, len(running) // 2), 0
        return running

    def _release(self, sequence: SequenceState, *, cache: bool) -> None:
        """Gives back the pages, row and slot of a running sequence."""
        self._withdraw_item(sequence)
        del self.running[sequence.request.request_id]
        written = sequence.written
        if cache and self.kv.has_uncached(sequence.pages, written):
            self.kv.cache(sequence.pages, sequence.all_token_ids, written)
        self.rows.free([sequence.row])
        self._give_back(sequence)
        sequence.computed, sequence.decode_item = 0, None
        sequence.verifying, sequence.last_on_device = False, True
        if sequence.elsewhere is not None:
            sequence.elsewhere.close(poisoned=not cache)

    def _give_back(self, sequence: SequenceState) -> None:
        self.kv.release(sequence.pages)
        self._seq_slots.free([sequence.seq_slot])
        sequence.seq_slot = sequence.row = -1

    def _withdraw_item(self, sequence: SequenceState) -> None:
        """Takes back what a sequence has on its way, wherever it waits: as if it had not been scheduled."""
        item = sequence.item
        if item is None:
            return
        for one in (item, *item.drafts):
            self._withdraw(one)
            self.rows.free(one.rows if one.is_draft else one.rows[1:])
        sequence.item = None
        sequence.sampled -= item.samples
        if item.of_prompt:
            sequence.computed = item.start

    def _wait_again(self, sequence: SequenceState) -> None:
        if sequence.guest is not None:
            self.counter.end(sequence.request.tenant)
            sequence.guest.end()
            return
        sequence.was_preempted = True
        self.waiting.add(sequence)
        self.counter.preempt(sequence.request.tenant)
