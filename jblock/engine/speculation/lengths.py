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
_RATES = tuple(n / 20 for n in range(1, 21))


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
    step: StepTime, blocks: Sequence[Times], sequences: int, tokens: int, most: int, pause: float
) -> float:
    """How often drafts of some sequences have to come true for it to be worth reading the step on its way
    before the next is planned. There will be drafts only if the token that is not read yet comes true.

    Args:
      step: of what is decoded anyway, their rows included.
      blocks: that their rows pass.
      sequences: how many.
      tokens: that the step brings.
      most: drafts of a sequence.
      pause: seconds for which the device rests meanwhile.

    Returns:
      Over 1 where none is.
    """
    counts = [(times, step.rows(times)) for times in blocks]
    grids = {size - rows for times, rows in counts for size in times.sizes}
    added = {
        rows_more: sum(times.of(rows + rows_more) - times.of(rows) for times, rows in counts)
        for rows_more in grids | {sequences * most}
        if 0 < rows_more <= sequences * most
    }
    for rate in _RATES:
        for rows_more, seconds in added.items():
            expected = sequences * sum_of_powers(rate, rows_more / sequences)
            ratio = 1 + (rate * seconds + pause) / step.seconds
            if rate * expected >= tokens * (GAIN * ratio - 1):
                return rate
    return math.inf


def sum_of_powers(rate: float, count: float) -> float:
    """How many of `count` drafts in a row come true."""
    return count if rate >= 1 else rate * (1 - rate**count) / (1 - rate)


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
