"""The chains that a request may be bound to in place of the one it names: those that are served for it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jblock.scheduler.itinerary import Budget
from jblock.scheduler.substitutes import Substitute, measured_together, substitutes
from jblock.zoo.assembled import assembled, place
from jblock.zoo.edge_records import Edge
from jblock.zoo.records import POLICIES, Chain, Step

# Of one model: as many as four substitutes make, each used or not.
_MOST = 15


@dataclasses.dataclass(frozen=True)
class Variants:
    """A model, and what may stand for it.

    Attributes:
      chain: the model.
      edges: that were measured in it, used or not: of two together a third may tell.
      chains: that are served for it.
    """

    chain: Chain
    edges: tuple[Edge, ...]
    chains: tuple[Chain, ...]


def variants(chain: Chain, edges: Sequence[Edge], budget: Budget) -> Variants:
    """What is served for requests of a model within a budget. Edges that do the least damage come first; one
    is left out where there would be more than 15 combinations with it."""
    widest = POLICIES.index(budget.policy)
    here = {one.id: one for one in edges if place(chain, one) is not None}
    measured = substitutes(chain, here.values(), budget.measure)
    allowed = [
        s for s in measured if s.damage <= budget.damage and POLICIES.index(s.policy) <= widest
    ]
    taken: list[Substitute] = []
    combinations: list[tuple[Substitute, ...]] = []
    for one in sorted(allowed, key=lambda s: (s.damage, s.edge)):
        more = [
            (*some, one)
            for some in _some(taken)
            if _apart((*some, one))
            and measured_together(chain, (*some, one), measured) <= budget.damage
        ]
        if len(combinations) + len(more) <= _MOST:
            taken.append(one)
            combinations += more
    made: dict[tuple[Step, ...], Chain] = {}
    for some in combinations:
        variant = assembled(chain, [here[s.edge] for s in some])
        made.setdefault(variant.steps, variant)
    return Variants(chain, tuple(here.values()), tuple(made.values()))


def _some(taken: Sequence[Substitute]) -> Iterator[tuple[Substitute, ...]]:
    """Any of them, or none."""
    for count in range(len(taken) + 1):
        yield from itertools.combinations(taken, count)


def _apart(some: Sequence[Substitute]) -> bool:
    """Whether no two replace the same step."""
    ordered = sorted(some, key=lambda s: s.first)
    return all(a.last <= b.first for a, b in itertools.pairwise(ordered))
