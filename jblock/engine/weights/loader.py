"""From disk over host memory to the device: what weight_cache wants there is read here."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from absl import logging

from jblock.blocks.slots import PIECE_RANK
from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters import compose as slot_content
from jblock.engine.adapters.compose import SlotContent
from jblock.engine.adapters.slot_tables import Updates, Writes, writes_of
from jblock.engine.config import EngineConfig
from jblock.engine.signature import MAX_TURNS, TableForm
from jblock.engine.weights import params as parameters
from jblock.engine.weights.cache import WeightCache
from jblock.engine.weights.host_cache import HostCache
from jblock.engine.weights.lease import Lease
from jblock.engine.weights.needs import Needs, ResidentSet, UsedTables, used_tables
from jblock.engine.weights.readers import Done
from jblock.engine.weights.residents import Adapter, Resident, Weights
from jblock.parallel.placement import Placement
from jblock.zoo.records import NotFoundError, ZooError
from jblock.zoo.store import Zoo

Targets = Mapping[ComponentSpec, frozenset[str]]
WidenTables = Callable[[Targets, Adapter], None]
AdapterWrites = dict[str, Writes]
"""What goes into the tables of each component of a chain that has tables, by component id."""
Background = Callable[[str, str, Callable[[], Any], Done], None]
"""(kind of work, what it is about, the work, what takes its result or error): runs the work anywhere, and
hands over the result between two steps of the loop. Work of one kind is done in order."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the records of an adapter say.

    Attributes:
      targets: component id -> what needs tables there.
      size: pieces it takes.
    """

    targets: dict[str, frozenset[str]]
    size: int


class AdapterUpdates(Protocol):
    """What gives the programs that write adapters: the runner."""

    def piece_update(self, spec: ComponentSpec, form: TableForm, count: int) -> Any:
        """The program that writes so many pieces into a component's tables."""
        ...

    def vector_update(self, spec: ComponentSpec, form: TableForm) -> Any:
        """The program that writes a slot's vectors into a component's tables."""
        ...

    def bits_update(self, spec: ComponentSpec, form: TableForm) -> Any:
        """The program that writes codes of few bits to a place in a component's tables."""
        ...


class Warming(NamedTuple):
    """Chains that are brought to the device before they are asked for, and who waits for them."""

    served: ResidentSet
    leases: list[Lease]
    done: concurrent.futures.Future[list[Lease]]


class Loads:
    """Carries out what an agent's weight_cache decides. Reads in the background, and writes between two
    steps, on the loop's thread.

    Attributes:
      weight_cache: what decides.
      cache: the host's tier.
      background: where work runs; until another is given, in `pump`, on the caller's own thread.
      widen_tables: takes {spec: targets} that tables have to be made for, and the adapter that wants
        them; `weight_cache.switch` or `refuse` follows.
      deferred: work that `pump` does.
      warming: chains that `pump` answers for once they are there.
    """

    def __init__(self, zoo: Zoo, placement: Placement, served: ResidentSet, config: EngineConfig):
        """Adapters wait until `attach` has named the device that writes them."""
        self.cache = HostCache(config.host_cache_mb * 10**6)
        self.background: Background = self._defer
        self._served, self._zoo, self._config = served, zoo, config
        self._placement = placement
        self.deferred: collections.deque = collections.deque()
        self.warming: list[Warming] = []
        self._replaced: set[UsedTables] = set()
        self._writing: list[Needs] = []  # by the adapters that are being read
        self.weight_cache = WeightCache(
            served,
            self,
            slots=config.adapter_slots,
            pieces=config.adapter_pieces,
            max_weight_bytes=config.weights_memory_mb * 10**6,
        )

    def attach(self, updates: AdapterUpdates, widen_tables: WidenTables) -> None:
        """Names the device that writes adapters, and who makes tables."""
        self._updates, self.widen_tables = updates, widen_tables

    def preload(self, all_needs: Iterable[Needs]) -> None:
        """Brings chains that are served first to the device, in this order, for as long as there is room;
        on the caller's own thread.

        Raises:
          ValueError: one cannot be read.
        """
        done: concurrent.futures.Future[list[Lease]] = concurrent.futures.Future()
        self.warm(self._served, all_needs, done)
        while not done.done():
            self.pump()
        for lease in done.result():
            self.weight_cache.release(lease)

    def switch(self, served: ResidentSet) -> None:
        """Goes over to other chains; see `WeightCache.switch`."""
        self.note_replaced(self._served)
        self._served = served
        self.weight_cache.switch(served)

    def note_replaced(self, served: ResidentSet) -> None:
        """Has `drop_tables` look at the tables of chains that are served no more."""
        self._replaced |= served.tables.keys()

    def drop_tables(self, running: Iterable[Needs]) -> None:
        """Frees tables that neither what is served uses, nor these chains, nor what is being read."""
        if self._replaced:
            used = self._served.tables.keys() | used_tables((*running, *self._writing)).keys()
            for tables, form in self._replaced - used:
                tables.drop(form)
            self._replaced &= used

    def pump(self) -> None:
        """Does what was put off, and answers for what was warmed."""
        while self.deferred:
            work, done = self.deferred.popleft()
            attempt(work, done)
        for warming in list(self.warming):
            leases = [lease for lease in warming.leases if not lease.released]
            failed = next((lease for lease in leases if lease.error), None)
            if failed is not None:
                for lease in leases:
                    self.weight_cache.release(lease)
                self.weight_cache.abandon(warming.served)
                warming.done.set_exception(ValueError(failed.error))
            elif all(lease.ready for lease in leases):
                warming.done.set_result(leases)
            else:
                continue
            self.warming.remove(warming)

    def warm(
        self,
        served: ResidentSet,
        all_needs: Iterable[Needs],
        done: concurrent.futures.Future[list[Lease]],
    ) -> None:
        """Brings chains, taken up or not, to the device, as far as there is room without
        waiting for it. `pump` gives `done` their leases, or the error of the first that cannot be read."""
        leases = [self.weight_cache.acquire(needs, optional=True) for needs in all_needs]
        self.warming.append(Warming(served, leases, done))

    # What weight_cache asks for

    def probe(self, adapter: Adapter, needs: Needs) -> None:
        """See `weight_cache.Worker`."""

        def done(probe: Probe | None, error: Exception | None) -> None:
            if probe is None:
                words = _words(adapter, error)
                self.weight_cache.note_probe(adapter, {}, 0, words, _code(error))
            else:
                self.weight_cache.note_probe(adapter, probe.targets, probe.size)

        read = functools.partial(_probe, self._zoo, adapter, needs)
        self.background("adapter", adapter.name, read, done)

    def load(self, resident: Resident, needs: Needs) -> None:
        """See `weight_cache.Worker`."""
        read: Callable[[], Any]
        place: Callable[[Any], None]
        if isinstance(resident, Weights):
            kind, read = "weights", functools.partial(self._read_weights, resident)
            place = functools.partial(self._place_weights, resident)
        elif isinstance(resident, Adapter):
            self._writing.append(needs)
            kind, read = "adapter", functools.partial(self._read_adapter, resident, needs)
            place = functools.partial(self._place_adapter, resident, needs)
        else:
            raise TypeError(f"a {type(resident).__name__} is neither weights nor an adapter")

        def done(content: Any, error: Exception | None) -> None:
            if error is None:
                try:
                    place(content)
                except Exception as e:  # It fails this load, not the loop.
                    error = e
            if isinstance(resident, Adapter):
                self._writing.remove(needs)
            words = _words(resident, error) if error else ""
            self.weight_cache.note_loaded(resident, words, _code(error))

        self.background(kind, resident.name, read, done)

    def widen(self, adapter: Adapter, needs: Needs) -> None:
        """See `weight_cache.Worker`."""
        wanted: dict[Any, frozenset[str]] = {}
        for part in needs.parts:
            targets = (adapter.targets or {}).get(part.component)
            if targets:
                wanted[part.spec] = wanted.get(part.spec, frozenset()) | targets
        self.widen_tables(wanted, adapter)

    # Reading, in the background

    def _read_weights(self, weights: Weights) -> parameters.Tensors:
        key = ("weights", weights.component, weights.placement.rules)
        bounded = bool(self._config.weights_memory_mb)
        arrays = self.cache.get(key) if bounded else None
        if arrays is None:
            stored = self._zoo.load_component(weights.component)
            arrays = parameters.prepared(
                weights.spec, stored, self._config.dtype, False, weights.placement
            )
            if bounded:  # otherwise none ever comes back
                self.cache.put(key, arrays, weights.size)
        return parameters.on_device(
            weights.spec, arrays, self._config.dtype, False, weights.placement
        )

    def _read_adapter(self, adapter: Adapter, needs: Needs) -> AdapterWrites:
        """What `Tables.write` takes, for each component that has tables."""
        key = ("adapter", adapter.deltas)
        prepared: dict[str, SlotContent] | None = self.cache.get(key)
        if prepared is None:
            specs = {part.component: part.spec for part in needs.parts}
            prepared = {
                component: slot_content.slot_content(
                    specs[component],
                    [(self._zoo.delta(d).spec, self._zoo.load_delta(d)) for d in deltas],
                    functools.partial(self._zoo.load_tensor, component),
                )
                for component, deltas in adapter.deltas
            }
            self.cache.put(key, prepared, sum(c.nbytes for c in prepared.values()))
        writes = {
            part.component: writes_of(
                part.spec, part.form, prepared.get(part.component), self._placement
            )
            for part in needs.parts
            if part.form is not None
        }
        jax.block_until_ready([(w.parts, w.vectors, w.bits) for w in writes.values()])
        return writes

    # Writing, between two steps

    def _place_weights(self, weights: Weights, tensors: parameters.Tensors) -> None:
        weights.tensors.update(tensors)

    def _place_adapter(self, adapter: Adapter, needs: Needs, writes: AdapterWrites) -> None:
        for part in {p.component: p for p in needs.parts}.values():
            if part.form is None or part.tables is None:
                continue
            mine = writes[part.component]
            updates = Updates(
                functools.partial(self._updates.piece_update, part.spec, part.form),
                functools.partial(self._updates.vector_update, part.spec, part.form),
                functools.partial(self._updates.bits_update, part.spec, part.form),
            )
            pieces = adapter.pieces[: mine.count]
            part.tables.write(adapter.slot, adapter.place, pieces, part.form, mine, updates)

    # Where nobody else does the work

    def defer(self, work: Callable[[], Any], done: Done) -> None:
        """Has `pump` do some work."""
        self.deferred.append((work, done))

    def _defer(self, kind: str, name: str, work: Callable[[], Any], done: Done) -> None:
        self.defer(work, done)


def weights_of(served: ResidentSet) -> list[Needs]:
    """What stands for all weights of some chains, without adapters; pinned ones first."""
    by_set: dict[int, Needs] = {}
    for name in (*served.pinned, *served.needs):
        by_set.setdefault(id(served.needs[name].weights), served.needs[name])
    return [dataclasses.replace(needs, adapter=None) for needs in by_set.values()]


def attempt(work: Callable[[], Any], done: Done) -> None:
    """Does some work and hands over what came of it."""
    try:
        result = work()
    except Exception as error:
        done(None, error)
    else:
        done(result, None)


def _probe(zoo: Any, adapter: Adapter, needs: Needs) -> Probe:
    specs = {c: [zoo.delta(d).spec for d in deltas] for c, deltas in adapter.deltas}
    size = max(slot_content.num_pieces(own) for own in specs.values())
    if size > MAX_TURNS:
        raise ZooError(
            f"it has {size * PIECE_RANK} ranks or virtual tokens; at most "
            f"{MAX_TURNS * PIECE_RANK} can be served"
        )
    bases = {part.component: part.spec for part in needs.parts}
    targets = {c: slot_content.targets(bases[c], own) for c, own in specs.items()}
    return Probe(targets, size)


def _code(error: Exception | None) -> str:
    """The status of who waits for something: what is not there just now may be there when asked again."""
    return "UNAVAILABLE" if isinstance(error, OSError | NotFoundError) else "INTERNAL"


def _words(resident: Resident, error: Exception | None) -> str:
    """Why something is not there, for the requests that wait for it."""
    if not isinstance(error, ZooError | OSError):
        logging.error("loading %s failed", resident.name, exc_info=error)
    return f"{resident.name} cannot be loaded: {error}"
