"""Which edges an operator accepts: a policy, and a threshold for each measure that counts."""

import dataclasses
import math
from collections.abc import Mapping

from jblock.zoo.edge_records import MEASURES, Edge
from jblock.zoo.records import POLICIES, ZooError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptancePolicy:
    """What an operator accepts of edges. By default nothing.

    Attributes:
      policy: the widest policy: "exact", "near" or "adaptive".
      thresholds: measure -> the worst value that is good enough.
    """

    policy: str = "exact"
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ZooError(f"policy {self.policy!r} is not known; known: {', '.join(POLICIES)}")
        for name, value in self.thresholds.items():
            if name not in MEASURES:
                raise ZooError(f"threshold {name!r} is no measure; measures: {', '.join(MEASURES)}")
            if not math.isfinite(value):
                raise ZooError(f"threshold {name}={value}: give a finite number")


def violations(edge: Edge, accepted: AcceptancePolicy) -> list[str]:
    """Why an edge may not be used; empty if it may.

    Every threshold must be met, by the worse end of the interval where there is one, and one of them must
    be of outputs: parameters that look alike are no proof.
    """
    found = []
    if POLICIES.index(edge.policy) > POLICIES.index(accepted.policy):
        found.append(f"{edge.kind} needs policy {edge.policy}, not {accepted.policy}")
    if not any(MEASURES[name].output for name in accepted.thresholds):
        outputs = ", ".join(n for n, m in MEASURES.items() if m.output)
        found.append(f"no threshold on outputs is set: set one of {outputs}")
    for name, bound in accepted.thresholds.items():
        score = edge.scores.get(name)
        if score is None:
            found.append(f"{name} was not measured")
            continue
        higher = MEASURES[name].better == "higher"
        worst = score.low if higher else score.high
        worst = score.value if worst is None else worst
        if (worst < bound) if higher else (worst > bound):
            found.append(f"{name} may be {worst:.4g}, {'under' if higher else 'over'} {bound:.4g}")
    return found
