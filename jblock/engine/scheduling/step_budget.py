"""Which of the ready rows run in a step, from measured times: pure functions, no device.

A step visits all instances once. Its time is shared out twice:

* decoding rows: every instance gets a share of the step in proportion to the time its rows would take,
  and from that its batch limit. A block that many chains pass gets a large one, a private one a small
  one. Rows over the limit stay in its queue, and go first in the next step.
* prompts: what decoding leaves of the step, and at least PROMPT_SHARE of it, goes to the chunks in
  flight, oldest first. A chunk whose time is up stays between two layers until the next step.
"""

import dataclasses
import math
from collections.abc import Sequence

from jblock.engine.scheduling.sequence import WorkItem

# Under a full load of decoding a prompt still moves on, at a quarter of the speed it would have alone.
PROMPT_SHARE = 0.25
# A batch is cut only where smaller ones cost at most this much more a row. Below that, calls spend their
# time on reading weights: cutting would have them read once more, and everybody would wait longer.
EFFICIENT = 1.25
NO_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Times:
    """How long one block takes for decoding rows, or for chunks of one length.

    Attributes:
      sizes: batch sizes it can run at, ascending.
      seconds: of one call of each size, never falling.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes, {len(self.seconds)} times; give one each")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes {self.sizes}; give whole numbers from 1, ascending")
        if list(self.seconds) != sorted(self.seconds) or self.seconds[0] <= 0:
            raise ValueError(f"seconds {self.seconds}; give positive times that never fall")

    def of(self, rows: float) -> float:
        """Seconds of the calls that carry `rows` rows."""
        full, rest = divmod(rows, self.sizes[-1])
        total = full * self.seconds[-1]
        if rest:
            total += next(t for s, t in zip(self.sizes, self.seconds, strict=True) if s >= rest)
        return total

    def most(self, seconds: float) -> int:
        """Most rows whose calls take at most `seconds`."""
        full = int(seconds / self.seconds[-1])
        rest = seconds - full * self.seconds[-1]
        fitting = (s for s, t in zip(self.sizes, self.seconds, strict=True) if t <= rest)
        return full * self.sizes[-1] + max(fitting, default=0)

    def cover(self, rows: int) -> tuple[int, ...]:
        """Sizes of the calls that carry `rows` rows in the least time, and of those the fewest."""
        best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
        for count in range(1, rows + 1):
            tries = []
            for size, seconds in zip(self.sizes, self.seconds, strict=True):
                rest = best[max(count - size, 0)]
                tries.append((rest[0] + seconds, rest[1] + 1, (size, *rest[2])))
            best.append(min(tries))
        return tuple(sorted(best[rows][2], reverse=True))

    @property
    def efficient(self) -> int:
        """The smallest size whose rows cost little more than those of the best one."""
        a_row = [t / s for s, t in zip(self.sizes, self.seconds, strict=True)]
        bound = EFFICIENT * min(a_row)
        return next(s for s, t in zip(self.sizes, a_row, strict=True) if t <= bound)


def batch_limits(wanted: Sequence[float], times: Sequence[Times], budget: float) -> list[int]:
    """Rows each block may decode in a step.

    Args:
      wanted: rows that have lately come to each block in a step.
      times: of each block.
      budget: seconds of a step.

    Returns:
      A limit for each, at least 1. None is under what is wanted if all that is wanted fits the budget;
      otherwise every block is cut by the same part of its time, yet not below what is efficient.
    """
    costs = [t.of(w) for w, t in zip(wanted, times, strict=True)]
    total = sum(costs)
    if not total:
        return [NO_LIMIT] * len(costs)
    # A hair more, so that what fits exactly is not lost to rounding.
    scale = budget / total * (1 + 1e-9)
    return [max(t.most(cost * scale), t.efficient) for cost, t in zip(costs, times, strict=True)]


def allowances(left: Sequence[float], seconds: float) -> list[float]:
    """How much of a step each chunk in flight may use.

    Args:
      left: seconds each still needs until the end of its chain, oldest first.
      seconds: for all of them together.
    """
    granted = []
    for need in left:
        granted.append(min(need, seconds))
        seconds -= granted[-1]
    return granted


def grant(chunks: Sequence[WorkItem], prompt_seconds: float) -> None:
    """Shares the time for prompts out to the chunks in flight."""
    if math.isinf(prompt_seconds):
        for item in chunks:
            item.allowance = math.inf
        return
    granted = allowances([i.seconds_left for i in chunks], prompt_seconds)
    for item, allowance in zip(chunks, granted, strict=True):
        # A chunk nobody has measured passes as a whole.
        item.allowance = allowance if item.seconds_left else math.inf
