"""Finding components that are alike without comparing all pairs.

A sketch is a sample of a component's elements, at places that only its spec decides, so that sketches of
one spec can be compared. A sample is read straight from the files, some hundred kilobytes of however many
megabytes, so nothing has to be kept for it. Signs of random projections of the sketches, in bands, bring
likely pairs together (SimHash, Charikar 2002; banding as in Leskovec et al., Mining of Massive Datasets,
chapter 3): work grows with the number of components and of alike pairs, not of all pairs.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np

from jblock.blocks.spec import canonical_json, spec_to_json
from jblock.zoo.records import ComponentRecord
from jblock.zoo.store import Zoo

ELEMENTS = 16384
_RUN = 256  # neighbours read at once
_ROW = 8192
# A pair of cosine 0.95 is missed once in ten million, of 0.9 in 3,000; one of 0 is looked at in a hundred.
_BANDS, _BITS = 48, 12


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


def alike(sketches: np.ndarray, least: float) -> list[tuple[int, int, float]]:
    """Pairs of rows (i < j) of `sketches` [n, elements] whose cosine is at least `least`, with it.

    All that collide in a band are looked at, and no others.
    """
    count, width = sketches.shape
    sizes = np.linalg.norm(sketches, axis=1)
    unit = sketches / np.maximum(sizes, 1e-30)[:, None]
    planes = np.random.default_rng(0).standard_normal((width, _BANDS * _BITS), np.float32)
    signs = (unit @ planes > 0).reshape(count, _BANDS, _BITS)
    codes = signs @ (1 << np.arange(_BITS))  # [n, bands]
    found: dict[tuple[int, int], float] = {}
    for band in range(_BANDS):
        buckets: dict[int, list[int]] = defaultdict(list)
        for row, code in enumerate(codes[:, band]):
            buckets[int(code)].append(row)
        for rows in buckets.values():
            if len(rows) > 1:
                cosines = unit[rows] @ unit[rows].T
                for a, b in zip(*np.nonzero(np.triu(cosines >= least, 1)), strict=True):
                    found[rows[a], rows[b]] = float(cosines[a, b])
    return [(i, j, cosine) for (i, j), cosine in sorted(found.items())]


def nearest(
    order: Sequence[int], pairs: Iterable[tuple[int, int, float]]
) -> list[tuple[int, int, float]]:
    """(row, other, cosine): for each row the one it is most alike to of those before it in `order`. So
    what is compared in full is one pair a component at most."""
    near: dict[int, dict[int, float]] = defaultdict(dict)
    for i, j, cosine in pairs:
        near[i][j] = near[j][i] = cosine
    before: set[int] = set()
    out = []
    for row in order:
        known = [(cosine, other) for other, cosine in near[row].items() if other in before]
        if known:
            cosine, other = max(known)
            out.append((row, other, cosine))
        before.add(row)
    return out


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
