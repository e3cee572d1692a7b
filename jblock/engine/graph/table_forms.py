"""Which components have slot tables, and of what form: worked out from the deltas of the chains served."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters import compose
from jblock.engine.adapters.slot_layout import has_few_bits
from jblock.engine.config import EngineConfig
from jblock.engine.signature import TableForm
from jblock.zoo.records import Chain

Targets = Mapping[ComponentSpec, frozenset[str]]


class Looked(NamedTuple):
    """What deltas on a component need.

    Attributes:
      targets: what needs tables for them.
      virtual: their virtual tokens.
      pieces: they take in the tables.
    """

    targets: frozenset[str]
    virtual: int
    pieces: int


ReadDeltas = Callable[[ComponentSpec, tuple[str, ...]], Looked | None]
"""Looks at deltas on a component of a spec; None where they cannot be read."""


class TableForms:
    """One form for all adapted components of a spec, so that they share their programs.

    Attributes:
      targets: what has tables, by spec.
      lasting: those of them that are asked for again by the next graph, whatever it finds.
      users: names of the chains that adapt each component.
      virtual: virtual tokens that sequences of a chain begin with, by its name.
      places: entries of tables of few bits, entry 0 not counted: as many as chains served have some, the
        next power of two, so that most changes keep the programs; 0: none has.
      pieces: that the tables have, piece 0 not counted: where all chains with deltas are approximate, as many
        as these take, the next power of two, so that few compressed fine-tunes take little memory.
    """

    def __init__(
        self,
        chains: Iterable[Chain],
        spec_of: Callable[[str], ComponentSpec],
        read: ReadDeltas,
        config: EngineConfig,
        before: Targets,
        more: Targets,
    ):
        """Looks at the deltas of chains.

        Of an exact chain one delta a spec is looked at, which nearly always tells of all; where it does not,
        tables are widened when the chain is asked for, and stay so. Of approximate ones all are: what
        compresses one component is not what compresses the next, and its tables are large, so they go with
        the last chain that needs them.

        Args:
          chains: that are served.
          spec_of: of a component by its id.
          read: looks at deltas.
          config: of the agent.
          before: `lasting` of what was served before.
          more: what to make tables for beside.
        """
        self._config = config
        self.targets: dict[ComponentSpec, frozenset[str]] = {}
        self.lasting: dict[ComponentSpec, frozenset[str]] = {}
        self.users: dict[str, set[str]] = {}
        self.virtual: dict[str, int] = {}
        exact: dict[ComponentSpec, set[str]] = collections.defaultdict(set)
        found: dict[ComponentSpec, set[str]] = collections.defaultdict(set)
        few_bits: set[str] = set()
        sizes: dict[str, int] = {}
        all_known = True
        for chain in chains:
            looked_at: dict[tuple[ComponentSpec, Sequence[str]], tuple[str, ...]] = {}
            for step in chain.steps:
                if step.deltas:
                    self.users.setdefault(step.component, set()).add(chain.name)
                    spec = spec_of(step.component)
                    which = () if chain.policy == "exact" else step.deltas
                    looked_at.setdefault((spec, which), step.deltas)
            for (spec, _), ids in looked_at.items():
                looked = read(spec, ids) or Looked(frozenset(), 0, 0)
                all_known &= bool(looked.targets) and chain.policy != "exact"
                found[spec] |= looked.targets
                if chain.policy == "exact":
                    exact[spec] |= looked.targets
                self.virtual[chain.name] = max(looked.virtual, self.virtual.get(chain.name, 0))
                sizes[chain.name] = max(looked.pieces, sizes.get(chain.name, 0))
                if any(map(has_few_bits, looked.targets)):
                    few_bits.add(chain.name)
        for spec in found:
            lasting = exact[spec] | before.get(spec, frozenset()) | more.get(spec, frozenset())
            self.lasting[spec] = frozenset(lasting)
            self.targets[spec] = frozenset(found[spec] | lasting)
        self._few_bits = few_bits
        wide = any(has_few_bits(t) for targets in self.targets.values() for t in targets)
        self.places = min(_next_power(len(few_bits)), config.adapter_slots) if wide else 0
        pieces = config.adapter_pieces
        self.pieces = min(max(_next_power(sum(sizes.values())), 2), pieces) if all_known else pieces

    def form(self, component: str, spec: ComponentSpec, domain: str) -> TableForm | None:
        """Of a component's tables; None where no chain of an isolation domain adapts it."""
        users = self.users.get(component, ())
        if not users or (domain and domain not in users):
            return None
        targets = tuple(sorted(self.targets[spec]))
        return TableForm(
            targets=targets,
            slots=self._config.adapter_slots + 1,
            pieces=self.pieces + 1,
            places=self.places + 1 if any(map(has_few_bits, targets)) else 0,
        )

    @property
    def table_pieces(self) -> int:
        """`Adapter.table_pieces` of every adapter."""
        return 0 if self.pieces == self._config.adapter_pieces else self.pieces

    def places_for(self, name: str) -> int:
        """How many places the tables have in which a chain has one; 0 where it has none."""
        return self.places if name in self._few_bits else 0


def _next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def read_deltas(spec: ComponentSpec, ids: tuple[str, ...], delta_of: Callable) -> Looked:
    """See ReadDeltas; `delta_of` reads a record."""
    deltas = [delta_of(id_).spec for id_ in ids]
    targets, virtual = compose.targets(spec, deltas), compose.virtual_tokens(deltas)
    return Looked(targets, virtual, compose.num_pieces(deltas))
