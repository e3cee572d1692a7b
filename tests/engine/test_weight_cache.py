"""What is on the device, by accounting alone: nothing in use leaves, nothing is counted twice, nobody
waits for ever. The worker is a table of what was asked for; the test answers when it likes."""

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jblock.engine.weights.cache import WeightCache
from jblock.engine.weights.lease import Lease
from jblock.engine.weights.residents import Adapter, State, Weights, WeightSet
from jblock.engine.weights.room import Room

SLOTS, PIECES, MAX_BYTES = 3, 6, 100
SIZES = {"a": 1, "b": 2, "c": 2, "d": 3, "e": 6, "f": 7}  # f never fits
BASE, BASE_BYTES, TUNE_BYTES = "base", 40, 25


@dataclasses.dataclass(frozen=True)
class FakeChain:
    name: str
    version: int = 1


@dataclasses.dataclass(eq=False)
class FakeNeeds:
    chain: FakeChain
    weights: WeightSet
    adapter: Adapter | None = None
    lacks_targets: bool = False


@dataclasses.dataclass(eq=False)
class FakeResidents:
    needs: dict[str, FakeNeeds]
    pinned: tuple[str, ...] = ()

    @property
    def residents(self):
        members = [w for r in self.needs.values() for w in r.weights.members]
        adapters = [r.adapter for r in self.needs.values() if r.adapter]
        return list(dict.fromkeys([*members, *adapters]))


class Worker:
    """Keeps what it was asked for."""

    def __init__(self):
        self.probes: list[Adapter] = []
        self.loads: list = []

    def probe(self, adapter, route):
        self.probes.append(adapter)

    def load(self, resident, route):
        assert resident.state is State.LOADING
        self.loads.append(resident)

    def widen(self, adapter, route):
        raise AssertionError("every table is wide enough")


def weights(name: str, size: int) -> Weights:
    return Weights(name=name, component=name, spec=None, size=size)


def graph(names, pinned=(), old: FakeResidents | None = None) -> FakeResidents:
    """Adapters on one base, and full fine-tunes ("tuneN") that share half of it."""
    known = old.needs if old else {}
    base = weights("base", BASE_BYTES)
    for route in known.values():
        base = route.weights.members[0]
    routes = {}
    shared = next((r.weights for r in known.values() if r.adapter), WeightSet((base,)))
    for name in names:
        if name in known:
            routes[name] = known[name]
        elif name in SIZES:
            adapter = Adapter(name=name, deltas=((name, ("delta",)),))
            routes[name] = FakeNeeds(FakeChain(name), shared, adapter)
        else:
            own = weights(name, TUNE_BYTES)
            routes[name] = FakeNeeds(FakeChain(name), WeightSet((base, own)))
    return FakeResidents(routes, pinned)


class Machine(RuleBasedStateMachine):
    """Any order of requests, ends, answers, failures and changes of what is served."""

    names = (*SIZES, "tune1", "tune2", "tune3")

    def __init__(self):
        super().__init__()
        self.worker = Worker()
        self.graph = graph(self.names, pinned=("b",))
        self.weight_cache = WeightCache(
            self.graph, self.worker, slots=SLOTS, pieces=PIECES, max_weight_bytes=MAX_BYTES
        )
        self.leases: list[Lease] = []
        self.seen = {r for r in self.graph.residents}

    @rule(name=st.sampled_from(names))
    def ask(self, name):
        if name in self.graph.needs:
            self.leases.append(self.weight_cache.acquire(self.graph.needs[name]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.weight_cache.release(lease)
        self.weight_cache.release(lease)  # twice is no mistake

    @precondition(lambda self: self.worker.probes)
    @rule(fails=st.integers(0, 9))
    def note_probe(self, fails):
        adapter = self.worker.probes.pop(0)
        error = "damaged" if not fails else ""
        self.weight_cache.note_probe(adapter, {}, SIZES[adapter.name], error)

    @precondition(lambda self: self.worker.loads)
    @rule(data=st.data(), fails=st.integers(0, 9))
    def loaded(self, data, fails):
        index = data.draw(st.integers(0, len(self.worker.loads) - 1))
        resident = self.worker.loads.pop(index)
        self.weight_cache.note_loaded(resident, "damaged" if not fails else "")

    @rule(names=st.sets(st.sampled_from(names), min_size=1), pin=st.booleans())
    def change(self, names, pin):
        pinned = tuple(n for n in ("b",) if pin and n in names)
        self.graph = graph(sorted(names), pinned, self.graph)
        self.seen.update(self.graph.residents)
        self.weight_cache.switch(self.graph)

    @invariant()
    def accounting_is_exact(self):
        there = [r for r in self.seen if r.state is not State.COLD]
        adapters = [r for r in there if isinstance(r, Adapter)]
        slots = [a.slot for a in adapters]
        pieces = [p for a in adapters for p in a.pieces]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(1, SLOTS + 1))
        assert len(set(pieces)) == len(pieces) and set(pieces) <= set(range(1, PIECES + 1))
        assert all(len(a.pieces) == a.size for a in adapters)
        assert self.weight_cache.slots_free == SLOTS - len(slots)
        assert self.weight_cache.pieces_free == PIECES - len(pieces)
        held = sum(r.size for r in there if isinstance(r, Weights))
        assert self.weight_cache.weight_bytes == held <= MAX_BYTES
        assert set(self.worker.loads) == {r for r in there if r.state is State.LOADING}
        for cold in self.seen - set(there):
            assert not isinstance(cold, Adapter) or (cold.slot, cold.pieces) == (0, [])

    @invariant()
    def what_is_leased_stays(self):
        granted = [lease for lease in self.leases if lease.granted and not lease.error]
        for lease in granted:
            parts = [*lease.needs.weights.members]
            parts += [lease.needs.adapter] if lease.needs.adapter else []
            states = {p.state for p in parts}
            assert State.COLD not in states
            assert lease.ready == (states == {State.READY})
        for resident in self.seen:
            assert not (resident.dropped and resident.state is State.READY) or resident.leases

    def teardown(self):
        """When everybody else leaves, whoever waits gets there, in whatever order they asked."""
        for _ in range(2000):
            for lease in [f for f in self.leases if f.ready or f.error]:
                self.leases.remove(lease)
                self.weight_cache.release(lease)
            if self.worker.probes:
                adapter = self.worker.probes.pop(0)
                self.weight_cache.note_probe(adapter, {}, SIZES[adapter.name])
            elif self.worker.loads:
                self.weight_cache.note_loaded(self.worker.loads.pop(0))
            elif not self.leases:
                break
        assert not self.leases and not self.weight_cache.wanting and not self.weight_cache.failed


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def make(names, slots=SLOTS) -> tuple[WeightCache, Worker, FakeResidents]:
    """A weight_cache whose base is loaded and whose adapters are known."""
    found, worker = graph(names), Worker()
    weight_cache = WeightCache(found, worker, slots=slots, pieces=PIECES, max_weight_bytes=0)
    for route in found.needs.values():
        route.adapter.targets, route.adapter.size = {}, SIZES[route.chain.name]
    return weight_cache, worker, found


def finish(weight_cache: WeightCache, worker: Worker) -> None:
    while worker.loads:
        weight_cache.note_loaded(worker.loads.pop(0))


def test_the_longest_unused_leaves_first():
    weight_cache, worker, found = make(["a", "b", "c", "d"])
    for name in ("a", "b", "c", "a"):
        lease = weight_cache.acquire(found.needs[name])
        finish(weight_cache, worker)
        assert lease.ready
        weight_cache.release(lease)
    weight_cache.acquire(found.needs["d"])  # 3 pieces of which 1 is free: b and its 2 go
    states = {n: r.adapter.state for n, r in found.needs.items()}
    assert states == {
        "a": State.READY,
        "b": State.COLD,
        "c": State.READY,
        "d": State.LOADING,
    }


def test_others_pass_who_waits_for_room_but_not_for_ever():
    """a keeps being asked for; b needs its slot. New requests for a wait behind b once b is first."""
    weight_cache, worker, found = make(["a", "b"], slots=1)
    running = weight_cache.acquire(found.needs["a"])
    finish(weight_cache, worker)
    waiting = weight_cache.acquire(found.needs["b"])
    later = weight_cache.acquire(found.needs["a"])
    assert running.ready and not waiting.granted and not later.granted
    weight_cache.release(running)
    assert waiting.granted and not later.granted
    finish(weight_cache, worker)
    assert waiting.ready
    weight_cache.release(waiting)
    assert later.granted


def test_who_gives_up_waiting_opens_what_was_closed_for_it():
    weight_cache, worker, found = make(["a", "b"], slots=1)
    running = weight_cache.acquire(found.needs["a"])
    finish(weight_cache, worker)
    weight_cache.release(weight_cache.acquire(found.needs["b"]))
    assert weight_cache.acquire(found.needs["a"]).ready and running.ready


def test_what_can_never_fit_is_refused_with_the_remedy():
    weight_cache, _, found = make(["a", "f"])
    lease = weight_cache.acquire(found.needs["f"])
    assert lease.error_code == "FAILED_PRECONDITION" and weight_cache.failed == [lease]
    assert "adapter_slots 3" in lease.error and "'f'" in lease.error


def adapter(name: str, places: int = 0, size: int = 1) -> Adapter:
    return Adapter(name=name, deltas=((name, ("delta",)),), places=places, size=size)


def needs_of(one: Adapter) -> FakeNeeds:
    return FakeNeeds(FakeChain(one.name), WeightSet(()), one)


def test_places_are_those_of_tables_of_one_size():
    room = Room(4, 8, 0)
    first, plain, other = adapter("a", places=1), adapter("b"), adapter("c", places=2)
    for one in (first, plain, other):
        assert room.victims([one], ()) == ([], True)
        room.occupy(one)
    assert (first.place, plain.place, other.place) == (1, 0, 1)
    second = adapter("d", places=1)
    assert room.victims([second], [plain, other, first]) == ([first], True)
    assert room.victims([second], [plain, other]) == ([], False)
    room.vacate(first)
    assert room.victims([second], [plain]) == ([], True)
    room.occupy(second)
    assert (first.place, second.place) == (0, 1)
    # Pinned on tables of another size, it is no reason against itself.
    assert "pin fewer" in room.problem(needs_of(first), [second])
    grown = adapter("d", places=2, size=5)
    assert not room.problem(needs_of(grown), [second, adapter("e", size=3)])
    assert "adapter_slots" in room.problem(needs_of(grown), [second, adapter("e", size=4)])
