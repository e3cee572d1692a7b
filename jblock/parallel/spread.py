"""How arrays whose sizes do not divide are spread over devices, without changing a result.

Sizes that a mesh does not divide are filled up with zeros: a zero column of an ffn adds nothing, a zero
row of a vocabulary is cut off the logits. KV heads are repeated where there are fewer than parts, so that
each device has those its query heads read, and query heads are filled up to an equal number a KV head.
"""

import math
from collections.abc import Sequence

import numpy as np

FILL = -1  # An entry that no source has: zeros.


def kv_heads(count: int, ways: int) -> np.ndarray:
    """Source KV head of every KV head on the mesh: int [lcm(count, ways)], each repeated in turn."""
    return np.repeat(np.arange(count), math.lcm(count, ways) // count)


def query_heads(heads: int, kv: int, ways: int) -> np.ndarray:
    """Source query head of every query head on the mesh, FILL where there is none.

    The heads that read one KV head are dealt to its copies in turn, as many to each.
    """
    groups = heads // kv
    copies = math.lcm(kv, ways) // kv
    each = -(-groups // copies)
    slots = np.arange(kv * copies * each).reshape(kv, copies * each)
    inside = slots % (copies * each)
    return np.where(inside < groups, np.arange(kv)[:, None] * groups + inside, FILL).reshape(-1)


def columns(size: int, ways: int) -> np.ndarray:
    """Source of every entry of an axis that is filled up to a multiple of `ways`."""
    places = np.arange(-(-size // ways) * ways)
    return np.where(places < size, places, FILL)


def elements(heads: np.ndarray, head_dim: int) -> np.ndarray:
    """Sources of an axis whose heads have `head_dim` entries each."""
    inside = heads[:, None] * head_dim + np.arange(head_dim)
    return np.where(heads[:, None] == FILL, FILL, inside).reshape(-1)


def spread(array: np.ndarray, sources: Sequence[np.ndarray | None]) -> np.ndarray:
    """Takes the entries of every axis from their sources, zeros where that is FILL.

    Args:
      array: as stored.
      sources: for each axis the index of every entry's source; None leaves it as it is.
    """
    for axis, source in enumerate(sources):
        if source is None or _unchanged(source, array.shape[axis]):
            continue
        array = np.take(array, np.maximum(source, 0), axis=axis)
        np.moveaxis(array, axis, 0)[source == FILL] = 0
    return array


def _unchanged(source: np.ndarray, size: int) -> bool:
    return len(source) == size and bool((source == np.arange(size)).all())
