"""Which chains are on the device: who may use it, what has to be read, and what leaves for it.

Pure accounting; reading and writing are another's (`loading.py`). An agent is told of all chains it may
serve, but holds on its device only weights and adapters that requests asked for. Both are bounded:
adapters by their slots and by pieces of rank, weights by bytes if that is wanted. A request takes a
lease on what its chain needs, and what is leased, or pinned, never leaves; of the rest, the longest
unused goes first.

Leases that need room are given in the order they were asked for. For the first that finds none,
leased residents are closed: they take no new leases until it has got its room, so its wait is bounded by
requests that run already. Leases that need no room pass it, unless what they want is closed.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from jblock.engine.weights.lease import Lease
from jblock.engine.weights.needs import Needs, ResidentSet, Worker
from jblock.engine.weights.residents import Adapter, Resident, State
from jblock.engine.weights.room import Room


@dataclasses.dataclass
class WeightCacheCounts:
    """What happened since the start.

    Attributes:
      hits: leases that found everything on the device.
      misses: leases that had to wait for something.
      loads: residents that were brought to the device.
      failures: those that could not be.
      evictions: residents that left it.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0


class WeightCache:
    """What is on the device of one agent. Not thread-safe: the loop's thread alone calls it.

    Attributes:
      counts: what happened so far.
      failed: leases that will never be ready and were not given back yet; the owner takes them out.
    """

    def __init__(
        self,
        served: ResidentSet,
        worker: Worker,
        *,
        slots: int,
        pieces: int,
        max_weight_bytes: int,
    ):
        """Takes up chains of which nothing is on the device yet.

        Args:
          served: the chains that may be asked for.
          worker: does the reading.
          slots: adapters that fit, each with one slot; numbered from 1.
          pieces: pieces they share; numbered from 1.
          max_weight_bytes: of all weights; 0 is no bound.
        """
        self.counts = WeightCacheCounts()
        self.failed: list[Lease] = []
        self._served, self._worker = served, worker
        self._room = Room(slots, pieces, max_weight_bytes)
        self._wanting: collections.deque[Lease] = collections.deque()
        # READY, without leases and not pinned; unused longest first.
        self._idle: collections.OrderedDict[Resident, None] = collections.OrderedDict()
        self._held: dict[Resident, None] = {}
        self._claims: tuple[Lease, list[Resident]] | None = None
        self._resident_chains: int | None = None
        self._mark_pinned()

    @property
    def slots_free(self) -> int:
        """Slots without an adapter."""
        return self._room.slots.num_free

    @property
    def pieces_free(self) -> int:
        """Pieces without an adapter."""
        return self._room.pieces.num_free

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that are on the device or have their room there."""
        return self._room.weight_bytes

    @property
    def adapters(self) -> int:
        """Adapters with a slot."""
        return self._room.slots.total - self._room.slots.num_free

    @property
    def adapter_slots(self) -> int:
        """Adapters that may have a slot at a time."""
        return self._room.slots.total

    @property
    def wanting(self) -> int:
        """Leases not granted yet."""
        return len(self._wanting)

    @property
    def resident_chains(self) -> int:
        """Served chains that a request would find ready."""
        if self._resident_chains is None:
            all_needs = self._served.needs.values()
            ready = {
                s: all(w.state is State.READY for w in s.members)
                for s in {r.weights for r in all_needs}
            }
            self._resident_chains = sum(
                ready[r.weights] and (r.adapter is None or r.adapter.state is State.READY)
                for r in all_needs
            )
        return self._resident_chains

    def acquire(self, needs: Needs, *, optional: bool = False) -> Lease:
        """A lease on all a chain needs; it may be ready at once. It has to be given back.

        Args:
          needs: of the chain.
          optional: give up, instead of waiting, where there is no room; the lease is released then.
        """
        lease = Lease(needs, optional)
        granted = self._try(lease, may_load=self._claims is None)
        if not optional:
            self.counts.hits += lease.ready
            self.counts.misses += not lease.ready
        if not granted and not lease.error:
            self._wanting.append(lease)
            self._grant()
        return lease

    def release(self, lease: Lease) -> None:
        """Gives a lease back; doing so twice is no mistake."""
        if lease.released:
            return
        lease.released = True
        if lease in self.failed:
            self.failed.remove(lease)
        if lease.granted:
            if lease.needs.adapter is not None:
                self._unhold(lease.needs.adapter)
            weights = lease.needs.weights
            weights.leases -= 1
            if not weights.leases:
                for member in weights.members:
                    self._unhold(member)
        elif lease in self._wanting:
            self._wanting.remove(lease)
        self._grant()

    def note_probe(
        self,
        adapter: Adapter,
        targets: Mapping[str, frozenset[str]],
        size: int,
        error: str = "",
        code: str = "INTERNAL",
    ) -> None:
        """Answers `Worker.probe`: what an adapter adapts and its size in pieces, or why nobody knows."""
        adapter.probing = False
        if error:
            self.counts.failures += 1
            self.refuse(adapter, error, code)
        else:
            adapter.targets, adapter.size = targets, size
        self._grant()

    def refuse(self, adapter: Adapter, error: str, code: str = "INTERNAL") -> None:
        """Fails every lease that still waits for room for an adapter."""
        for lease in [w for w in self._wanting if w.needs.adapter is adapter]:
            self._fail(lease, error, code)

    def note_loaded(self, resident: Resident, error: str = "", code: str = "INTERNAL") -> None:
        """Answers `Worker.load`: the resident is in its place, or why it is not."""
        waiters, resident.waiters = resident.waiters, []
        self._resident_chains = None
        if error:
            self.counts.failures += 1
            self._vacate(resident)
        else:
            self.counts.loads += 1
            resident.state = State.READY
        for lease in waiters:
            lease.pending -= 1
            if error and not lease.released:
                self._fail(lease, error, code)
        self._settle(resident)
        self._grant()

    def switch(self, served: ResidentSet) -> None:
        """Takes up another served. What it does not have leaves, at once or with its last lease; leases
        that wait for a chain it has too go over to its needs."""
        self._drop(self._served, served)
        self._served = served
        self._resident_chains = None
        for resident in served.residents:
            resident.dropped = False
        self._mark_pinned()
        for lease in self._wanting:
            needs = served.needs.get(lease.needs.chain.name)
            if needs is not None and needs.chain == lease.needs.chain:
                lease.needs = needs
            if lease.needs.adapter is not None and lease.needs.adapter.targets is not None:
                lease.needs.adapter.probing = False  # it waited for these tables, if for any
        for lease in [w for w in self._wanting if w.needs.lacks_targets]:
            if lease.needs not in served.needs.values():
                name = lease.needs.chain.name
                self._fail(lease, f"model {name!r} was unloaded meanwhile", "NOT_FOUND")
        self._grant()

    def abandon(self, served: ResidentSet) -> None:
        """Lets go of what was loaded for chains that is not taken up after all."""
        self._drop(served, self._served)

    # Granting

    def _grant(self) -> None:
        """Gives what can be given, in order; closes residents for the first that finds no room."""
        blocked = False
        for lease in list(self._wanting):
            adapter = lease.needs.adapter
            if blocked and adapter is not None and adapter.size and adapter.state is State.COLD:
                continue  # the common case when many wait
            if self._try(lease, may_load=not blocked):
                self._wanting.remove(lease)
            elif not lease.error and self._needs_room(lease):
                if lease.optional:
                    lease.released = True
                    self._wanting.remove(lease)
                elif not blocked:
                    blocked = True
                    self._claim(lease)
        if not blocked:
            self._unclaim()

    def _try(self, lease: Lease, *, may_load: bool) -> bool:
        """Grants a lease if all it needs has room, or finds some; begins the reading."""
        adapter, weights = lease.needs.adapter, lease.needs.weights
        if lease.error:
            return False
        if adapter is not None and adapter.targets is None:
            if not adapter.probing:
                adapter.probing = True
                self._worker.probe(adapter, lease.needs)
            return False
        parts: tuple[Resident, ...] = (
            weights.members if adapter is None else (adapter, *weights.members)
        )
        mine = self._claims is not None and self._claims[0] is lease
        if not mine and any(p.closing for p in parts):
            return False
        cold = [p for p in parts if p.state is State.COLD]
        if cold:
            if problem := self._room.problem(lease.needs, self._pinned):
                self._fail(lease, problem, "FAILED_PRECONDITION")
                return False
            if lease.needs.lacks_targets and adapter is not None:
                if not adapter.probing:
                    adapter.probing = True  # until tables for it are there
                    self._worker.widen(adapter, lease.needs)
                return False
            if not may_load or not self._make_room(cold, set(parts)):
                return False
        lease.granted = True
        if mine:
            self._unclaim()
        if adapter is not None:
            self._hold(adapter)
        weights.leases += 1
        if weights.leases == 1:
            for member in weights.members:
                self._hold(member)
        for part in parts:
            if part.state is not State.READY:
                lease.pending += 1
                part.waiters.append(lease)
        for part in cold:
            part.state = State.LOADING
            self._worker.load(part, lease.needs)
        return True

    def _needs_room(self, lease: Lease) -> bool:
        """Whether a lease that was not granted waits for room, and not for its records or tables, or
        for others to have had their turn."""
        adapter, parts = lease.needs.adapter, lease.needs.weights.members
        if adapter is not None and (adapter.targets is None or adapter.probing):
            return False
        residents = (adapter, *parts) if adapter is not None else parts
        return any(p.state is State.COLD for p in residents)

    def _fail(self, lease: Lease, error: str, code: str = "INTERNAL") -> None:
        if not lease.error:
            lease.error, lease.error_code = error, code
            self.failed.append(lease)
        if lease in self._wanting:
            self._wanting.remove(lease)

    # Room

    def _make_room(self, cold: Sequence[Resident], own: set[Resident]) -> bool:
        """Evicts what nobody uses, longest unused first, and gives `cold` its room; all or nothing."""
        victims, enough = self._room.victims(cold, (r for r in self._idle if r not in own))
        if not enough:
            return False
        for victim in victims:
            self._evict(victim)
        for part in cold:
            self._room.occupy(part)
        return True

    def _claim(self, lease: Lease) -> None:
        """Closes as many leased residents as the first lease in line needs, those with fewest users."""
        if self._claims is not None and self._claims[0] is lease:
            return
        self._unclaim()
        adapter, members = lease.needs.adapter, lease.needs.weights.members
        parts: tuple[Resident, ...] = members if adapter is None else (adapter, *members)
        cold = [p for p in parts if p.state is State.COLD]
        idle = [r for r in self._idle if r not in parts]
        held = [r for r in self._held if not r.pinned and r not in parts]
        victims, _ = self._room.victims(cold, sorted(held, key=lambda r: r.leases), idle)
        for victim in victims:
            victim.closing = True
        self._claims = (lease, victims)

    def _unclaim(self) -> None:
        if self._claims is not None:
            for victim in self._claims[1]:
                victim.closing = False
            self._claims = None

    # States

    def _hold(self, resident: Resident) -> None:
        resident.leases += 1
        self._held[resident] = None
        self._idle.pop(resident, None)

    def _unhold(self, resident: Resident) -> None:
        resident.leases -= 1
        if not resident.leases:
            del self._held[resident]
        self._settle(resident)

    def _settle(self, resident: Resident) -> None:
        """Puts a resident that is ready and has no users where it belongs."""
        if resident.state is not State.READY or resident.leases:
            return
        if resident.dropped:
            self._evict(resident)
        elif not resident.pinned:
            self._idle[resident] = None
            self._idle.move_to_end(resident)

    def _evict(self, resident: Resident) -> None:
        self.counts.evictions += 1
        self._resident_chains = None
        self._vacate(resident)

    def _vacate(self, resident: Resident) -> None:
        """Takes back the room of a resident."""
        resident.state = State.COLD
        resident.closing = False
        self._idle.pop(resident, None)
        self._room.vacate(resident)

    def _drop(self, old: ResidentSet, new: ResidentSet) -> None:
        kept = set(new.residents)
        for resident in old.residents:
            if resident not in kept:
                resident.dropped = True
                resident.pinned = False
                self._settle(resident)

    def _mark_pinned(self) -> None:
        self._pinned: set[Resident] = set()
        for name in self._served.pinned:
            needs = self._served.needs[name]
            self._pinned.update(needs.weights.members, [needs.adapter] if needs.adapter else [])
        for resident in self._served.residents:
            resident.pinned = resident in self._pinned
            if resident.pinned:
                self._idle.pop(resident, None)
            elif resident not in self._idle:
                self._settle(resident)
