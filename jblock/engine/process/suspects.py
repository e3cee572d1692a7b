"""Which requests may run after a process died, so that the one that ended it is found.

What the process computed when it died is suspect. The suspects run again by themselves: first all of them
together, for the cause may have been none of them (a kill from outside); where that ends another process,
in halves, one half after the other. A suspect that gets a few tokens further than it was is cleared. One that
ends a process while it runs alone, the third in a row that it was there at, is found.
"""

import collections
import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping

from jblock.engine import api

# The engine enqueues a step before it reads the tokens of the last, so a request that is resumed just before
# the step that ended a process may get two tokens and still end the next one.
_CLEARING_TOKENS = 3
# Of a request that runs alone: with fewer, kills from outside would prove something against it. One that was
# found by halving has been there at as many anyway.
_PROVING_DEATHS = 3
# A group that neither goes on nor ends the process holds the others up for so long at most, twice as long
# after each death it was there at.
_PATIENCE_SECONDS = 30.0
# A request that got no token in so many processes that died is suspect, in their steps or not: the cause may
# lie in reading what it needs.
_BARREN_DEATHS = 2


@dataclasses.dataclass
class Held:
    """An open request, and all that is needed to run it again.

    Attributes:
      request: as submitted.
      delivered: its tokens so far.
      submitted: the present process has it.
      submissions: how many processes had it.
      cancelled: the present process was told to end it.
      deaths: at how many it was suspect since it last went on.
      barren: how many processes in a row died without a token for it.
      fresh: tokens the present process gave it.
    """

    request: api.Request
    delivered: list[int] = dataclasses.field(default_factory=list)
    submitted: bool = False
    submissions: int = 0
    cancelled: bool = False
    deaths: int = 0
    barren: int = 0
    fresh: int = 0

    def __post_init__(self):
        self.delivered += self.request.generated

    @property
    def id(self) -> str:
        """Its request id."""
        return self.request.request_id

    def take(self, output: api.Output) -> None:
        """Keeps what was delivered."""
        self.delivered += output.token_ids
        self.fresh += len(output.token_ids)
        if self.fresh:
            self.barren = 0
        if self.fresh >= _CLEARING_TOKENS:
            self.deaths = 0

    def resumed(self) -> api.Request:
        """The request for the present process."""
        self.submitted, self.fresh = True, 0
        self.submissions += 1
        return dataclasses.replace(self.request, generated=tuple(self.delivered))


class Suspects:
    """The order in which requests run again. Truth value: whether any are under suspicion."""

    def __init__(self) -> None:
        self._groups: collections.deque[list[str]] = collections.deque()  # Not run again yet.
        self._running: list[
            str
        ] = []  # The group that the present process runs, and the cleared ones.
        self._patient_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._groups or self._running)

    @property
    def ids(self) -> set[str]:
        """Those under suspicion."""
        return {*self._running, *(i for group in self._groups for i in group)}

    def next(self, open_requests: Mapping[str, Held]) -> list[Held]:
        """What the present process may be given now."""
        self.look(open_requests)
        while self._groups and not self._running:
            group = [open_requests[i] for i in self._groups.popleft() if i in open_requests]
            if group:
                self._running = [held.id for held in group]
                patience = _PATIENCE_SECONDS * 2 ** max(held.deaths for held in group)
                self._patient_until = time.monotonic() + patience
                return group
        if self:
            return []
        return [held for held in open_requests.values() if not held.submitted]

    def forget(self, ids: Collection[str]) -> None:
        """Drops requests that run elsewhere now."""
        groups = ([i for i in group if i not in ids] for group in self._groups)
        self._groups = collections.deque(_filled(groups))

    def look(self, open_requests: Mapping[str, Held]) -> None:
        """Clears those of the running group that went on or ended; after its time, all of it."""
        if self._running and time.monotonic() > self._patient_until:
            self._running = []
        self._running = [i for i in self._running if i in open_requests and open_requests[i].deaths]

    def died(self, open_requests: Mapping[str, Held], running: Collection[str]) -> str | None:
        """Takes stock of a death.

        Args:
          open_requests: all, with what each was given by the process that is gone.
          running: ids that it was computing.

        Returns:
          The id of the request that is found to be the cause, if one is. It is not run again.
        """
        there = [held for held in open_requests.values() if held.submitted]
        for held in there:
            held.barren += not held.fresh
            held.submitted = False
        before = [held for held in there if held.deaths]
        suspects = before or (
            [held for held in there if held.barren >= _BARREN_DEATHS]
            or [held for held in there if held.id in running]
            or there
        )
        for held in suspects:
            held.deaths += 1
        self._running = []
        ids = [held.id for held in suspects]
        if not before:
            groups = [ids]
        elif len(ids) > 1:
            groups = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
        elif len(there) == 1 and suspects[0].deaths >= _PROVING_DEATHS:
            return ids[0]
        else:
            groups = [ids]
        self._groups.extendleft(reversed(_filled(groups)))
        return None


def _filled(groups: Iterable[list[str]]) -> list[list[str]]:
    return [group for group in groups if group]
