"""How many tokens to draft, from measured times and from how often drafts came true: no device.

After SmartSpec (arXiv 2406.14066): of all drafts that are to be had the likeliest come first, and as many of
them are verified as bring the most expected tokens a second. Where more rows cost as much as what they
bring, as on a full device, that is none.
"""

import dataclasses
import math
from collections.abc import Sequence

from jblock.engine.scheduling.step_budget import Times

# What the outcomes of older drafts keep of their weight when a newer one is known.
_MEMORY = 0.85
# How many outcomes the first assumption counts for.
_ASSUMED = 2.0
# What drafting has to gain at least: times are measured, and the next step is planned a little later for it.
GAIN = 1.05


@dataclasses.dataclass
class Acceptance:
    """How often the next token is the drafted one, lately.

    Attributes:
      assumed: before anything is known.
    """

    assumed: float
    _true: float = 0.0
    _seen: float = 0.0

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return (self._true + _ASSUMED * self.assumed) / (self._seen + _ASSUMED)

    def note(self, accepted: int, drafted: int) -> None:
        """Learns that of so many drafts in a row the first `accepted` came true. Those behind the first
        wrong one say nothing."""
        seen = min(accepted + 1, drafted)
        self._true = _MEMORY * self._true + accepted
        self._seen = _MEMORY * self._seen + seen


class StepTime:
    """Seconds of a decoding step by how many rows pass each block."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._times: dict[int, Times] = {}
        self.seconds = 0.0

    def rows(self, times: Times) -> int:
        """Those that pass a block."""
        return self._rows.get(id(times), 0)

    def add(self, blocks: Sequence[Times], rows: int = 1) -> None:
        """Takes more rows through blocks, each known by its record."""
        for times in blocks:
            before = self._rows.get(id(times), 0)
            self._rows[id(times)], self._times[id(times)] = before + rows, times
            self.seconds += times.of(before + rows) - (times.of(before) if before else 0.0)


def least_rate(
    step: StepTime, blocks: Sequence[Times], tokens: int, most: int, pause: float
) -> float:
    """How often drafts of some sequences have to come true for any to be worth verifying.

    Args:
      step: of what is decoded anyway, their rows included.
      blocks: that their rows pass.
      tokens: that the step brings.
      most: drafts there may be.
      pause: seconds for which the device rests because drafts wait for what was read.

    Returns:
      Over 1 where none is.
    """
    counts = [(times, step.rows(times)) for times in blocks]
    best = math.inf
    for more in {size - rows for times, rows in counts for size in times.sizes} | {most}:
        if 0 < more <= most:
            added = sum(times.of(rows + more) - times.of(rows) for times, rows in counts)
            ratio = 1 + (added + pause) / step.seconds
            best = min(best, tokens * (GAIN * ratio - 1) / more)
    return best


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What one sequence may have verified.

    Attributes:
      blocks: that its rows pass.
      rate: how often the next token is the drafted one.
      most: tokens drafted.
    """

    blocks: Sequence[Times]
    rate: float
    most: int


def choose(
    drafts: Sequence[Proposal], step: StepTime, tokens: int, room: int, budget: float
) -> list[int]:
    """How many tokens of each draft to verify.

    Args:
      drafts: of some sequences.
      step: of what is decoded anyway; rows of drafts are added to it.
      tokens: that it brings.
      room: most rows beside it.
      budget: most seconds; twice those of the step as it is are always given, for others wait for it too.
    """
    budget = max(budget, 2 * step.seconds)
    likely = sorted(
        ((draft.rate**n, i) for i, draft in enumerate(drafts) for n in range(1, draft.most + 1)),
        key=lambda one: -one[0],
    )
    chosen, best = [0] * len(drafts), GAIN * tokens / step.seconds if step.seconds else math.inf
    so_far, expected = [0] * len(drafts), float(tokens)
    for chance, i in likely[:room]:
        step.add(drafts[i].blocks)
        if step.seconds > budget:
            break
        so_far[i] += 1
        expected += chance
        if expected / step.seconds >= best:
            chosen, best = list(so_far), expected / step.seconds
    return chosen
