"""What a chain needs on the device, and who brings it there."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_tables import Tables
from jblock.engine.signature import TableForm
from jblock.engine.weights.residents import Adapter, Resident, WeightSet
from jblock.zoo.records import Chain

UsedTables = tuple[Tables, TableForm]


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
      tables: the slot tables of their components, with the forms they are used in.
    """

    needs: Mapping[str, Needs]
    residents: Sequence[Resident]
    pinned: tuple[str, ...] = ()

    @functools.cached_property
    def tables(self) -> Mapping[UsedTables, Part]:
        """See there."""
        return used_tables(self.needs.values())


def used_tables(all_needs: Iterable[Needs]) -> dict[UsedTables, Part]:
    """The slot tables that chains use, with their forms, and a component that has them."""
    # Adapters of one base have the same parts.
    runs = {id(needs.parts): needs.parts for needs in all_needs}
    return {(p.tables, p.form): p for parts in runs.values() for p in parts if p.tables and p.form}


class Worker(Protocol):
    """Does what the weight cache decides. Each call returns at once; answers come by
    `note_probe`, `note_loaded` and `switch`, never from within the call."""

    def probe(self, adapter: Adapter, needs: Needs) -> None:
        """Finds out the targets and the size of an adapter."""
        ...

    def load(self, resident: Resident, needs: Needs) -> None:
        """Brings a resident to the room it was given."""
        ...

    def widen(self, adapter: Adapter, needs: Needs) -> None:
        """Has tables made for the projections of an adapter that none was known to adapt."""
        ...
