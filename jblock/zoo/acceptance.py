"""Which edges an operator accepts: a policy, and a threshold for each measure that counts."""

import dataclasses
import math
from collections.abc import Mapping

from jblock.zoo.edge_records import MEASURES, Edge, Score
from jblock.zoo.records import POLICIES, ZooError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptancePolicy:
    """What an operator accepts of edges. By default nothing.

    Attributes:
      policy: the widest policy: "exact", "near" or "adaptive".
      thresholds: measure -> the worst value that is good enough; of a change its size counts.
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

    Every threshold must be met by the worse end of its interval, and one of them must be on a measure that
    licenses a substitution (`Measure.licenses`): parameters that look alike are no proof, nor is perplexity.
    """
    found = []
    if POLICIES.index(edge.policy) > POLICIES.index(accepted.policy):
        found.append(f"{edge.kind} needs policy {edge.policy}, not {accepted.policy}")
    if not any(MEASURES[name].licenses for name in accepted.thresholds):
        enough = " or ".join(n for n, m in MEASURES.items() if m.licenses)
        found.append(f"no threshold that licenses a substitution is set: set one on {enough}")
    for name, bound in accepted.thresholds.items():
        score = edge.scores.get(name)
        if score is None:
            found.append(f"{name} was not measured" + _HOW.get(name, ""))
            continue
        bad = worst(name, score)
        limit = abs(bound) if MEASURES[name].two_sided else bound
        higher = MEASURES[name].better == "higher" and not MEASURES[name].two_sided
        if (bad >= limit) if higher else (bad <= limit):
            continue
        size = "the size of " if MEASURES[name].two_sided else ""
        text = f"{size}{name} may be {bad:.4g}, {'under' if higher else 'over'} {limit:.4g}"
        count = needed(name, score, bound)
        if count is not None:
            unit = "items" if name == "accuracy_change" else "tokens"
            text += f": {score.count:,} {unit} cannot decide it, about {count:,} would"
        found.append(text)
    return found


_CLOSEST = 1e-6  # of the interval's width: a trillion times as many items
_HOW = {"accuracy_change": ": give --items"}


def worst(name: str, score: Score) -> float:
    """The end of an interval that counts against a threshold. A change counts in both directions: a
    substitute that answers better than the original by as much is as much another model."""
    low = score.value if score.low is None else score.low
    high = score.value if score.high is None else score.high
    if MEASURES[name].two_sided:
        return max(abs(low), abs(high))
    return low if MEASURES[name].better == "higher" else high


def needed(name: str, score: Score, bound: float) -> int | None:
    """How many tokens or items would decide a threshold that the value meets and its interval does not.

    Taken from what was seen: the interval narrows with the square root of the count. None if the value
    itself does not meet the threshold, or is so close to it that no count would do, or all of the interval
    meets it.
    """
    value = abs(score.value) if MEASURES[name].two_sided else score.value
    limit = abs(bound) if MEASURES[name].two_sided else bound
    higher = MEASURES[name].better == "higher" and not MEASURES[name].two_sided
    room = value - limit if higher else limit - value
    width = abs(worst(name, score) - value)
    if room <= width * _CLOSEST or width <= room or not score.count:
        return None
    return math.ceil(score.count * (width / room) ** 2)
