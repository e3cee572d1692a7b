"""Finding components that are alike without comparing all pairs.

A sketch is a sample of a component's elements, at places that only its spec decides, so that sketches of
one spec can be compared. A sample is read straight from the files, some hundred kilobytes of however many
megabytes, so nothing has to be kept for it. Each is compared with its nearest neighbors (`neighbors.py`) and
with the most used ones, so work grows with the number of components, also where all are alike.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np

from jblock.adapt import neighbors
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.zoo.records import ComponentRecord
from jblock.zoo.store import Zoo

ELEMENTS = 16384
_RUN = 256  # neighbors read at once
_ROW = 8192
_NEIGHBORS = 8
_HUBS = 16  # of the most used components: bases, which may lie further off than the siblings of a fine-tune


def group(record: ComponentRecord) -> str:
    """What components must have in common to be compared."""
    dtypes = {n: t.dtype for n, t in record.tensors.items()}
    return canonical_json([spec_to_json(record.spec), dtypes, sorted(record.refs)])


def sketch(zoo: Zoo, record: ComponentRecord) -> np.ndarray:
    """float32 [n], at most about ELEMENTS of a component's own elements, each tensor by its share."""
    total = sum(int(np.prod(t.shape)) for t in record.tensors.values())
    rng = np.random.default_rng(_seed(group(record)))
    parts = []
    for name, tensor in sorted(record.tensors.items()):
        size = int(np.prod(tensor.shape))
        runs = max(1, round(ELEMENTS * size / total / _RUN))
        if size <= runs * _RUN:
            starts, length = np.zeros(1, np.int64), size
        else:
            starts, length = np.sort(rng.integers(0, size - _RUN, runs)), _RUN
        part = zoo.read_runs(record.id, name, starts, length)
        # A tensor counts as much as it does in the whole.
        parts.append(part * np.float32((size / part.size) ** 0.5))
    return np.concatenate(parts)


def alike(sketches: np.ndarray, least: float, uses: Sequence[int]) -> list[tuple[int, int, float]]:
    """Pairs of rows (i < j) of `sketches` whose cosine is at least `least`, with it: each row with those it
    is most alike to, and with the most used of those it is alike to.

    So there are at most some pairs a row, however many are alike.

    Args:
      sketches: float32 [n, elements]; scaled to length 1 in place.
      least: smallest cosine.
      uses: how often each is used.
    """
    sizes = np.sqrt(np.vecdot(sketches, sketches))
    real = np.flatnonzero(np.isfinite(sizes) & (sizes > 0)).tolist()
    if len(real) < len(sketches):  # what is all zeros, or no numbers, is like nothing
        kept = alike(sketches[real], least, [uses[i] for i in real])
        return [(real[i], real[j], cosine) for i, j, cosine in kept]
    sketches /= sizes[:, None]
    rows, far = neighbors.nearest(sketches, _NEIGHBORS)
    found = [(np.repeat(np.arange(len(rows)), rows.shape[1]), rows.reshape(-1), far.reshape(-1))]
    for hub in sorted(range(len(uses)), key=lambda i: (-uses[i], i))[:_HUBS]:
        if uses[hub] < 2:
            break
        apart = 2 - 2 * (sketches @ sketches[hub])
        others = np.flatnonzero(np.arange(len(uses)) != hub)
        found.append((np.full(len(others), hub), others, apart[others]))
    one, other, apart = (np.concatenate(parts) for parts in zip(*found, strict=True))
    cosines = 1 - apart / 2  # of rows of length 1, apart by that square
    near = (cosines >= least) & (one >= 0) & (other >= 0)
    pairs = {
        (min(i, j), max(i, j)): c
        for i, j, c in zip(
            one[near].tolist(), other[near].tolist(), cosines[near].tolist(), strict=True
        )
    }
    return [(i, j, cosine) for (i, j), cosine in sorted(pairs.items())]


def counterparts(
    pairs: Iterable[tuple[int, int, float]], uses: Sequence[int], count: int
) -> list[tuple[int, int, float]]:
    """(row, other, cosine): for each row at most `count` others that may replace it, most alike first. The
    most used replace the others, of equally used ones the first replace the later."""
    near: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for i, j, cosine in pairs:
        row, other = (j, i) if (-uses[i], i) < (-uses[j], j) else (i, j)
        near[row].append((cosine, other))
    return [
        (row, other, cosine)
        for row in sorted(near)
        for cosine, other in sorted(near[row], key=lambda pair: (-pair[0], pair[1]))[:count]
    ]


class Reference:
    """What others are compared with: a component's tensors as float32 [n], and their squared sizes."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = {name: _wide(value.reshape(-1)) for name, value in tensors.items()}
        self.squares = {name: _dot(value, value) for name, value in self.tensors.items()}


def cosine(one: Mapping[str, np.ndarray], other: Reference) -> dict[str, float]:
    """Cosine of two components' tensors, by name, and of all elements as one vector under ""."""
    sums = {name: np.zeros(3) for name in (*one, "")}
    for name, value in one.items():
        a, b = value.reshape(-1), other.tensors[name]
        for at in range(0, a.size, 1 << 18):  # float32 copies that stay in the CPU's cache
            x = _wide(a[at : at + (1 << 18)])
            sums[name] += (_dot(x, b[at : at + x.size]), _dot(x, x), 0)
        sums[name][2] = other.squares[name]
        sums[""] += sums[name]
    return {n: float(xy / max(np.sqrt(xx * yy), 1e-30)) for n, (xy, xx, yy) in sums.items()}


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """The product of two vectors, in pieces too short for BLAS to wake threads that others use."""
    whole = x.size - x.size % _ROW
    rows = np.vecdot(x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64) + np.vecdot(x[whole:], y[whole:]))


def _wide(value: np.ndarray) -> np.ndarray:
    """In float32; from bfloat16, which is its upper half, several times faster than a cast."""
    if value.dtype == ml_dtypes.bfloat16:
        return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
