"""Decoding rows that leave their home, in groups."""

import itertools
import time
from collections.abc import Callable, Sequence

from jblock.engine.graph.graph import Hop
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import SequenceState, WorkItem

Send = Callable[[Hop, Sequence[WorkItem]], None]

# Running sequences travel in so many groups at most.
_MOST_GROUPS = 4
# An agent computes one while the next is on its way.
_GROUPS_AT_AGENT = 2
# A group that stays away longer keeps no other back.
_MOST_SECONDS = 1.0


class Departures:
    """Rows for which their agent has groups enough wait here, and go with the next that leave for it: a call
    of a block takes nearly as long for a few rows as for many, and groups that formed as prompts ended would
    stay as small as they were."""

    def __init__(self, sequences: Scheduler, send: Send):
        """`send(hop, items)` sends a group."""
        self._sequences, self._send = sequences, send
        self._numbers = itertools.count()
        # By the key of the opening: which agent has it, in which group, and since when.
        self._away: dict[int, tuple[int, int, float]] = {}
        self._kept: dict[Hop, dict[int, WorkItem]] = {}

    def leave(self, hop: Hop, items: dict[int, WorkItem]) -> None:
        """Sends items, by the keys of their openings, and those that waited for them; or keeps some."""
        self._kept.setdefault(hop, {}).update(items)
        self._go(hop)

    def forget(self, key: int) -> None:
        """An item is back, or nobody waits for it any more."""
        self._away.pop(key, None)
        for kept in self._kept.values():
            kept.pop(key, None)

    def look(self) -> None:
        """Lets those go that wait for others that do not come."""
        for hop in list(self._kept):
            if not any(_comes_to(hop, s) for s in self._sequences.running.values()):
                self._go(hop)

    def _go(self, hop: Hop) -> None:
        assert hop.agent is not None
        items = list(self._kept.pop(hop).items())
        size, now = self._group_size(hop, items), time.monotonic()
        for _ in range(_GROUPS_AT_AGENT - self._groups_at(hop.agent, now)):
            group, items = items[:size], items[size:]
            if group:
                place = (hop.agent, next(self._numbers), now)
                self._away.update((key, place) for key, _ in group)
                self._send(hop, [item for _, item in group])
        if items:
            self._kept[hop] = dict(items)

    def _groups_at(self, agent: int, now: float) -> int:
        places = self._away.values()
        return len({n for at, n, since in places if at == agent and now < since + _MOST_SECONDS})

    def _group_size(self, hop: Hop, items: Sequence[tuple[int, WorkItem]]) -> int:
        """So that each agent of a chain has one while the others travel."""
        here = sum(s.elsewhere is not None for s in self._sequences.running.values())
        agents = 1 + max((len(item.sequence.route.agents) for _, item in items), default=1)
        return max(1, -(-here // min(agents, _MOST_GROUPS)))


def _comes_to(hop: Hop, sequence: SequenceState) -> bool:
    """Whether a sequence has a decoding row here that will leave for the hop's agent."""
    item = sequence.item
    return (
        item is not None
        and item.chunk == 1
        and not item.is_away
        and hop.agent in sequence.route.agents
    )
