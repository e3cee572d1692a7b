"""Who waits, who runs, and what the running ones hold: slots, register rows and KV pages."""

import collections
from collections.abc import Iterator

from jblock.engine.config import EngineConfig
from jblock.engine.graph.graph import KvGroup
from jblock.engine.kv_cache.host_offload import HostPool
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import withdraw
from jblock.engine.scheduling.sequence import Sequence, WorkItem


class Admission:
    """The sequences of one agent.

    Attributes:
      waiting: in the order they are to start.
      running: by request id, in the order they started.
      rows: register rows.
      kv: pages.
      preemptions: how often a sequence gave way to another.
      swaps: how often its pages were copied to the host for that.
    """

    def __init__(self, device: Runner, config: EngineConfig):
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: dict[str, Sequence] = {}
        self.rows = IdAllocator(device.num_rows)
        host = HostPool(config.host_kv_memory_mb * 10**6, device.longest_bytes)
        self.kv = KVCacheManager(device.pool_shapes, config.page_size, device, host)
        self.preemptions = self.swaps = 0
        self._device = device
        self._seq_slots = IdAllocator(config.max_num_seqs)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences that have not ended, running ones first."""
        yield from self.running.values()
        yield from self.waiting

    def find(self, request_id: str) -> Sequence | None:
        """The open sequence of a request."""
        return self.running.get(request_id) or next(
            (s for s in self.waiting if s.request.request_id == request_id), None
        )

    @property
    def passing(self) -> list[WorkItem]:
        """Chunks of prompts on their way through the blocks, those of the oldest sequence first."""
        items = (s.item for s in self.running.values())
        return [item for item in items if item is not None and item.chunk > 1]

    def admit(self) -> None:
        """Starts waiting requests in order. One that lacks pages holds back only those that want
        pages of the same group; one whose prompt begins as a prompt being computed waits for it, and
        one that needs programs still being made, or a chain still being read, waits for that alone."""
        held: set[KvGroup] = set()
        still_waiting: collections.deque[Sequence] = collections.deque()
        while self.waiting and self._seq_slots.free and self.rows.free:
            sequence = self.waiting.popleft()
            groups = sequence.route.groups
            not_yet = not sequence.lease.ready or (self._device.plain_only and not sequence.plain)
            if not_yet or self.kv.awaits(sequence):
                still_waiting.append(sequence)
                continue
            if held.intersection(groups) or not self.kv.admit(sequence):
                held.update(groups)
                still_waiting.append(sequence)
                continue
            sequence.seq_slot = self._seq_slots.take(1)[0]
            sequence.row = self.rows.take(1)[0]
            sequence.prefill = len(sequence.known)
            sequence.sampled = len(sequence.generated)
            self.running[sequence.request.request_id] = sequence
        still_waiting.extend(self.waiting)
        self.waiting = still_waiting

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for one more token of a sequence; under pressure the youngest sequences of its groups
        give way until there is room again. False: it was the youngest itself."""
        groups = set(sequence.route.groups)
        while not self.kv.grow(sequence, num_tokens):
            rivals = [s for s in self.running.values() if groups.intersection(s.route.groups)]
            self._preempt(rivals[-1])
            if rivals[-1] is sequence:
                return False
        return True

    def end(self, sequence: Sequence, *, poisoned: bool) -> None:
        """Forgets a sequence and takes back all it held; what a poisoned one computed is not found
        again."""
        if sequence.request.request_id in self.running:
            self._release(sequence, poisoned)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.kv.drop_copy(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes all a sequence holds and puts it first in the queue. Its pages go to the host where
        that is cheaper than computing them anew and there is room; its prefix stays cached besides
        for as long as nobody wants the pages."""
        self.preemptions += 1
        withdraw(sequence, self.rows)
        written, rates = _written(sequence), self._device.rates
        if rates and rates.swap_pays(self.kv.copy_bytes(sequence, written), written):
            self.swaps += self.kv.swap_out(sequence, written)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence, poisoned: bool = False) -> None:
        """Gives back the pages, row and slot of a running sequence."""
        withdraw(sequence, self.rows)
        del self.running[sequence.request.request_id]
        if not poisoned:
            self.kv.remember(sequence, _written(sequence))
        self.kv.release(sequence, poisoned)
        self.rows.give([sequence.row])
        self._seq_slots.give([sequence.seq_slot])
        sequence.seq_slot = sequence.row = -1
        sequence.computed = 0


def _written(sequence: Sequence) -> int:
    """How many of a running sequence's first tokens have their KV enqueued, as far as known."""
    if sequence.computed < sequence.prefill:
        return sequence.computed
    return min(sequence.prompt_len + sequence.sampled - 1, len(sequence.known))
