"""What can be on the device."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from jblock.parallel.placement import SINGLE, Placement


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
    waiters: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, kw_only=True)
class Weights(Resident):
    """The parameters of one component.

    Attributes:
      component: its id.
      spec: of the component.
      size: bytes on the device.
      placement: the devices it lies on.
      tensors: device arrays by name; empty while it is not READY, and always the same dict.
    """

    component: str
    spec: Any
    size: int
    placement: Placement = SINGLE
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)


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
      table_pieces: how many the tables have that its pieces lie in; 0: all that adapters on the device share.
      places: how many the tables have that its codes of few bits lie in; 0: it has no codes.
      place: its place in these; 0 while it has none.
    """

    deltas: tuple[tuple[str, tuple[str, ...]], ...]
    targets: Mapping[str, frozenset[str]] | None = None
    probing: bool = False
    size: int = 0
    slot: int = 0
    pieces: list[int] = dataclasses.field(default_factory=list)
    table_pieces: int = 0
    places: int = 0
    place: int = 0
