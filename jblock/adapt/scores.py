"""Scores of an edge from what was measured row by row and item by item, with 95% intervals.

Tokens of a row depend on each other, and so do rows that follow each other in a text. So means are taken over
runs of neighboring rows (batch means), few enough that runs are nearly independent, and their interval is
Student's, with as many degrees of freedom. Task items are independent and paired: each is answered by both
chains.
"""

import math

import numpy as np
from scipy import stats

from jblock.zoo.edge_records import Score

_Z = 1.959964
_RUNS = 12  # of neighboring rows: each has as many rows as it takes


def mean_score(
    by_row: np.ndarray, count: int, low: float = -math.inf, high: float = math.inf
) -> Score:
    """The mean over rows that follow each other in a text, with its interval, kept within `low` and `high`.

    Args:
      by_row: float [rows]; at least 2 for an interval.
      count: tokens they have.
      low: the least that the mean can be.
      high: the most.
    """
    value = float(np.mean(by_row))
    runs = np.array([part.mean() for part in np.array_split(by_row, min(_RUNS, len(by_row)))])
    width = 0.0
    if len(runs) > 1:
        t = float(stats.t.ppf(0.975, len(runs) - 1))
        width = t * float(np.std(runs, ddof=1)) / math.sqrt(len(runs))
    return Score(
        value=value,
        low=min(max(value - width, low), value),
        high=max(min(value + width, high), value),
        count=count,
    )


def perplexity_change(original: np.ndarray, substitute: np.ndarray, count: int) -> Score:
    """Perplexity of the substitute over that of the original, less 1, from nats per token of each row."""
    change = mean_score(substitute - original, count)
    value, low, high = (
        math.expm1(min(x, 700.0)) for x in (change.value, change.low or 0.0, change.high or 0.0)
    )
    return Score(value=value, low=low, high=high, count=count)


def paired(original: np.ndarray, substitute: np.ndarray) -> Score:
    """The change of a share of right items, both bool [items], with the interval of Agresti and Min (2005):
    half an item is added to each of the four cells, so that no disagreement seen is not taken for none."""
    n = len(original)
    gained = int(np.sum(substitute & ~original))
    lost = int(np.sum(original & ~substitute))
    low, high = _paired_interval(gained, lost, n)
    value = (gained - lost) / n
    return Score(value=value, low=min(low, value), high=max(high, value), count=n)


def _paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    center = (b - c) / m
    width = _Z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return center - width, center + width
