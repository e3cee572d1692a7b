"""Who is to be served next: the weighted Virtual Token Counter (arXiv 2401.00588).

Every tenant has a level: the service it was given, in seconds of profiled device time, over its weight. The
tenant of the lowest level goes next, so tenants that always have something waiting are served alike, by
weight, to within a bound that does not grow with time. Nothing is kept for who has nothing to do: a tenant
that comes back begins level with the least of those that wait. No device time is ever left idle for it.
"""

import bisect
import collections
import dataclasses
import heapq
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set

from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.scheduling.sequence import SequenceState

# A tenant with so many sequences running above its share gives one up to a tenant that has none: near its
# share it would only lose what it computed.
_MOST_ABOVE_SHARE = 2.0
# Tenants without anything open that are remembered.
_MAX_IDLE = 1000


@dataclasses.dataclass
class _Account:
    """What is known of one tenant.

    Attributes:
      weight: its share in proportion to those of others.
      level: seconds served over the weight, and what it was lifted by.
      served: seconds.
      waiting: how many of its sequences wait.
      running: how many run.
    """

    weight: float = 1.0
    level: float = 0.0
    served: float = 0.0
    waiting: int = 0
    running: int = 0


class VirtualTokenCounter:
    """The levels of all tenants. Thread-safe: the schedulers of several groups of devices have one."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._last = ""  # The tenant that was the last to have something waiting.
        self._lock = threading.Lock()

    def arrive(self, tenant: str, weight: float) -> None:
        """A request has come. That of a tenant with nothing waiting lifts it to the least level of those
        that have, or to that of the last one that had."""
        with self._lock:
            account = self._of(tenant)
            account.weight = weight
            if not account.waiting:
                floor = min((a.level for a in self._accounts.values() if a.waiting), default=None)
                if floor is None:
                    floor = self._of(self._last).level if self._last else 0.0
                account.level = max(account.level, floor)
            account.waiting += 1

    def start(self, tenant: str) -> None:
        """One of its sequences waits no more, and runs."""
        with self._lock:
            self._leave(tenant)
            self._of(tenant).running += 1

    def withdraw(self, tenant: str) -> None:
        """One of its sequences waits no more, and has ended."""
        with self._lock:
            self._leave(tenant)
            self._forget()

    def preempt(self, tenant: str) -> None:
        """One of its sequences runs no more, and waits again. It was there all along: nothing is lifted."""
        with self._lock:
            account = self._of(tenant)
            account.running -= 1
            account.waiting += 1

    def end(self, tenant: str) -> None:
        """One of its sequences runs no more, and has ended."""
        with self._lock:
            self._of(tenant).running -= 1
            self._forget()

    def charge(self, tenant: str, seconds: float) -> None:
        """Service was given."""
        with self._lock:
            account = self._of(tenant)
            account.served += seconds
            account.level += seconds / account.weight

    def level(self, tenant: str) -> float:
        """Of one tenant."""
        account = self._accounts.get(tenant)
        return account.level if account else 0.0

    def rank(self, tenant: str) -> tuple[float, int]:
        """What decides whose turn it is: the level, and where that is the same how many it has running."""
        return self.level(tenant), self.running(tenant)

    def running(self, tenant: str) -> int:
        """How many of its sequences run."""
        account = self._accounts.get(tenant)
        return account.running if account else 0

    def excess(self, tenant: str) -> float:
        """How many more of its sequences run than its share of all that run, among tenants with something
        open."""
        with self._lock:
            busy = [a for a in self._accounts.values() if a.waiting or a.running]
            account = self._of(tenant)
            share = account.weight / sum(a.weight for a in busy) if busy else 1.0
            return account.running - share * sum(a.running for a in busy)

    def snapshot(self) -> tuple[tuple[str, int, int, float], ...]:
        """(tenant, waiting, running, seconds served) of each that is known."""
        with self._lock:
            return tuple((n, a.waiting, a.running, a.served) for n, a in self._accounts.items())

    def _of(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account()
        return account

    def _leave(self, tenant: str) -> None:
        account = self._of(tenant)
        account.waiting -= 1
        if not account.waiting:
            self._last = tenant

    def _forget(self) -> None:
        """Lets go of the least served of those that have nothing open, where they are many: they would be
        lifted over their level anyway."""
        if len(self._accounts) <= _MAX_IDLE:
            return
        idle = [n for n, a in self._accounts.items() if not a.waiting and not a.running]
        for name in sorted(idle, key=self.level)[: len(self._accounts) - _MAX_IDLE]:
            if name != self._last:
                del self._accounts[name]


class WaitingQueue:
    """Sequences that wait. Within a tenant the most urgent priority goes first, then what was preempted, then
    the earliest deadline, then who came first."""

    def __init__(self) -> None:
        self._lines: dict[str, list[SequenceState]] = {}
        self._by_id: dict[str, SequenceState] = {}
        # Hundreds may wait, and be asked about in every step: what is asked is counted when they come.
        self._with_deadline: dict[str, SequenceState] = {}
        self._shapes: dict[str, frozenset[KVShape]] = {}
        self._shape_sets: collections.Counter[frozenset[KVShape]] = collections.Counter()
        self._arrivals = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(list(self._by_id.values()))

    def get(self, request_id: str) -> SequenceState | None:
        """The sequence of a request, if it waits."""
        return self._by_id.get(request_id)

    def add(self, sequence: SequenceState) -> None:
        """Takes one that has come, or that was preempted."""
        sequence.arrival = sequence.arrival or next(self._arrivals)
        line = self._lines.setdefault(sequence.request.tenant, [])
        bisect.insort(line, sequence, key=_urgency)
        request_id, shapes = sequence.request.request_id, frozenset(sequence.pages.layers)
        self._by_id[request_id] = sequence
        self._shapes[request_id] = shapes
        self._shape_sets[shapes] += 1
        if sequence.latest_start < math.inf and not sequence.was_preempted:
            self._with_deadline[request_id] = sequence

    def remove(self, sequence: SequenceState) -> None:
        """Takes one out."""
        line = self._lines[sequence.request.tenant]
        at = bisect.bisect_left(line, _urgency(sequence), key=_urgency)
        assert line[at] is sequence
        del line[at]
        if not line:
            del self._lines[sequence.request.tenant]
        request_id = sequence.request.request_id
        del self._by_id[request_id]
        self._with_deadline.pop(request_id, None)
        shapes = self._shapes.pop(request_id)
        self._shape_sets[shapes] -= 1
        if not self._shape_sets[shapes]:
            del self._shape_sets[shapes]

    def too_late(self, now: float) -> list[SequenceState]:
        """Sequences that have not started, and could not be complete in time any more."""
        return [s for s in self._with_deadline.values() if s.latest_start < now]

    def all_want(self, shapes: Set[KVShape]) -> bool:
        """Whether each that waits wants pages of one of some shapes."""
        return all(not shapes.isdisjoint(wanted) for wanted in self._shape_sets)

    def fair_order(self, rank: Callable[[str], tuple[float, int]]) -> Iterator[SequenceState]:
        """Each that waits now, the most urgent priority first, then what was preempted, as long as pages of
        it are cached, then the tenant of the lowest rank. A rank is read again after each of the tenant's, so
        it may rise meanwhile.

        Args:
          rank: of a tenant.
        """
        heads: list[
            tuple[tuple[int, bool, tuple[float, int], int], str, int, list[SequenceState]]
        ] = []

        def push(name: str, line: list[SequenceState], at: int) -> None:
            if at < len(line):
                first = line[at]
                urgency = first.request.priority, not first.was_preempted
                heapq.heappush(heads, ((*urgency, rank(name), first.arrival), name, at, line))

        for name, line in self._lines.items():
            push(name, list(line), 0)
        while heads:
            _, name, at, line = heapq.heappop(heads)
            yield line[at]
            push(name, line, at + 1)


def _urgency(sequence: SequenceState) -> tuple[int, bool, float, int]:
    deadline = math.inf if sequence.was_preempted else sequence.deadline
    return sequence.request.priority, not sequence.was_preempted, deadline, sequence.arrival


def most_served(counter: VirtualTokenCounter, sequences: Sequence[SequenceState]) -> SequenceState:
    """Of running sequences, oldest first, the one that gives way: of those with the least urgent priority
    the youngest of the tenant that was served most. Tenants count as served alike where less than one
    sequence lies between them: the youngest has least to lose."""
    lowest = max([s.request.priority for s in sequences])
    among = [s for s in sequences if s.request.priority == lowest]
    levels = {tenant: counter.level(tenant) for tenant in {s.request.tenant for s in among}}
    if len(levels) == 1:
        return among[-1]
    least = max(
        levels[s.request.tenant] - s.token_seconds * s.num_tokens / s.request.weight for s in among
    )
    return [s for s in among if levels[s.request.tenant] >= least][-1]


def who_may_yield(
    counter: VirtualTokenCounter,
    sequence: SequenceState,
    running: Iterable[SequenceState],
    *,
    any_shape: bool,
) -> list[SequenceState]:
    """Of running sequences, oldest first, those that may give way to one of a tenant with nothing running:
    other tenants' that have some more than their share. They need pages of its shapes, unless `any_shape`."""
    own, running = sequence.request, list(running)
    if counter.running(own.tenant):
        return []
    shapes, level = sequence.pages.layers.keys(), counter.level(own.tenant)
    tenants = {s.request.tenant for s in running}
    rich = {name for name in tenants if counter.excess(name) >= _MOST_ABOVE_SHARE}
    return [
        s
        for s in running
        if s.request.tenant in rich
        and s.request.priority >= own.priority
        and counter.level(s.request.tenant) >= level
        and (any_shape or not shapes.isdisjoint(s.pages.layers))
    ]
