"""The sequences that wait, in a line for each tenant."""

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Iterator

from jblock.engine.scheduling.sequence import SequenceState


class WaitingQueue:
    """Sequences that wait. Within a tenant the most urgent priority goes first, then what was preempted, then
    the earliest deadline, then who came first."""

    def __init__(self) -> None:
        self._lines: dict[str, list[SequenceState]] = {}
        self._by_id: dict[str, SequenceState] = {}
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
        self._by_id[sequence.request.request_id] = sequence

    def remove(self, sequence: SequenceState) -> None:
        """Takes one out."""
        line = self._lines[sequence.request.tenant]
        at = bisect.bisect_left(line, _urgency(sequence), key=_urgency)
        assert line[at] is sequence
        del line[at]
        if not line:
            del self._lines[sequence.request.tenant]
        del self._by_id[sequence.request.request_id]

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
