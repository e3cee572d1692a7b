"""What may stand in the place of a chain's steps, and what it does to the answers, as it was measured."""

import dataclasses
from collections.abc import Iterable, Sequence

from jblock.zoo.acceptance import worst
from jblock.zoo.edge_records import Edge
from jblock.zoo.records import Chain, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Substitute:
    """An edge at its place in a chain.

    Attributes:
      first: index of the first step whose place it takes.
      last: index behind the last.
      steps: that take it.
      damage: measured from end to end.
      policy: it needs.
      edge: its id.
    """

    first: int
    last: int
    steps: tuple[Step, ...]
    damage: float
    policy: str
    edge: str


def substitutes(chain: Chain, edges: Iterable[Edge], measure: str) -> list[Substitute]:
    """Where edges that were measured in a chain can stand in it. What was measured in another chain says
    nothing of this one. Damage is the worse end of a measure's interval, of a change its size."""
    name, found = f"{chain.name}@{chain.version}", []
    for edge in edges:
        score = edge.scores.get(measure)
        if edge.chain != name or score is None:
            continue
        damage, n = max(worst(measure, score), 0.0), len(edge.original)
        for first in range(1, len(chain.steps) - n + 1):
            if chain.steps[first : first + n] == edge.original:
                found.append(
                    Substitute(
                        first=first,
                        last=first + n,
                        steps=edge.substitute,
                        damage=damage,
                        policy=edge.policy,
                        edge=edge.id,
                    )
                )
    return found


def measured_together(
    chain: Chain, used: Sequence[Substitute], measured: Iterable[Substitute]
) -> float:
    """The damage of substitutes in one chain: where some of them were measured together, that counts; of what
    was not, the sum."""
    left, total = sorted(used, key=lambda s: s.first), 0.0
    for wide in sorted(measured, key=lambda s: s.first - s.last):
        within = [s for s in left if wide.first <= s.first and s.last <= wide.last]
        if len(within) < 2:
            continue
        spelled, at = [], wide.first
        for one in within:
            spelled += [*chain.steps[at : one.first], *one.steps]
            at = one.last
        if (*spelled, *chain.steps[at : wide.last]) == wide.steps:
            total += wide.damage
            left = [s for s in left if s not in within]
    return total + sum(s.damage for s in left)
