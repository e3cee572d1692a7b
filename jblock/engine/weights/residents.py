"""What can be on the device, what a request needs of it, and who brings it there."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_tables import Tables
from jblock.engine.signature import TableForm
from jblock.parallel.placement import SINGLE, Placement
from jblock.zoo.records import Chain


class State(enum.Enum):
    """Where a resident stands."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"


@dataclasses.dataclass(eq=False, kw_only=True)
class Resident:
    """Something that is on the device while it is wanted.

    Attributes:
      name: for messages.
      state: COLD holds nothing, LOADING has its room already.
      leases: users; more than 0 keeps it.
      pinned: kept without users.
      closing: takes no new leases.
      dropped: belongs to no served chain any more; leaves with its last lease.
      waiters: leases to be told when it is ready.
    """

    name: str
    state: State = State.COLD
    leases: int = 0
    pinned: bool = False
    closing: bool = False
    dropped: bool = False
    waiters: list["Lease"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, kw_only=True)
class Weights(Resident):
    """The parameters of one component.

    Attributes:
      component: its id.
      spec: of the component.
      size: bytes on the device.
      placement: the devices it lies on.
      tensors: device arrays by name; empty while it is not READY.
    """

    component: str
    spec: Any
    size: int
    placement: Placement = SINGLE
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class WeightSet:
    """The weights of all components of a chain; one for all chains with the same components, so that a
    lease counts once. `leases` is how many are held on it."""

    members: tuple[Weights, ...]
    leases: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class Adapter(Resident):
    """The deltas of one chain, which share a slot.

    Attributes:
      deltas: (component id, delta ids) of every step that has some.
      targets: component id -> what needs tables there; None until its records were read.
      probing: its records are being read.
      size: pieces it takes in the tables; 0 until its records were read.
      slot: its slot in all tables; 0 while it has none.
      pieces: ids of its pieces.
    """

    deltas: tuple[tuple[str, tuple[str, ...]], ...]
    targets: Mapping[str, frozenset[str]] | None = None
    probing: bool = False
    size: int = 0
    slot: int = 0
    pieces: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One component of a chain: its id, its spec, and its slot tables with their form, if any chain
    adapts it."""

    component: str
    spec: ComponentSpec
    form: TableForm | None
    tables: Tables | None


@dataclasses.dataclass(frozen=True, eq=False)
class Needs:
    """What a chain needs on the device.

    Attributes:
      chain: its record.
      parts: its components, one a step.
      weights: of its components, whether they are on the device or not.
      adapter: its deltas; None without.
    """

    chain: Chain
    parts: tuple[Part, ...]
    weights: WeightSet
    adapter: Adapter | None = None

    @property
    def lacks_targets(self) -> bool:
        """Its deltas want tables that are not there."""
        targets = (self.adapter.targets if self.adapter else None) or {}
        return any(
            not targets.get(p.component, frozenset()) <= set(p.form.targets if p.form else ())
            for p in self.parts
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSet:
    """What the chains that are served together may bring to the device.

    Attributes:
      needs: of each chain, by name.
      residents: all of it.
      pinned: names of the chains that stay on the device.
    """

    needs: Mapping[str, Needs]
    residents: Sequence[Resident]
    pinned: tuple[str, ...] = ()


@dataclasses.dataclass(eq=False)
class Lease:
    """A claim on what a chain needs; `WeightCache.acquire` makes it.

    Attributes:
      needs: what is claimed.
      optional: given up where it would have to wait for room.
      granted: room is there for all of it, and will stay until the lease is given back.
      pending: how much of that is still being read.
      error: why it will never be ready, and in error_code the name of a gRPC status.
      released: given back.
    """

    needs: Needs
    optional: bool = False
    granted: bool = False
    pending: int = 0
    error: str = ""
    error_code: str = ""
    released: bool = False

    @property
    def ready(self) -> bool:
        """All of it is on the device."""
        return self.granted and not self.pending and not self.error

    @property
    def slot(self) -> int:
        """Slot of its adapter in the tables; 0 without."""
        return self.needs.adapter.slot if self.needs.adapter else 0


class Worker(Protocol):
    """Does what residency decides. Each call returns at once; answers come by `probed`, `finished` and
    `switch`, never from within the call."""

    def probe(self, adapter: Adapter, needs: Needs) -> None:
        """Finds out the targets and the size of an adapter."""
        ...

    def load(self, resident: Resident, needs: Needs) -> None:
        """Brings a resident to the room it was given."""
        ...

    def widen(self, adapter: Adapter, needs: Needs) -> None:
        """Has tables made for the projections of an adapter that none was known to adapt."""
        ...
