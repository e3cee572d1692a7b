"""Nearest rows of a matrix without comparing all pairs, also where all rows are alike.

A forest of random projection trees (Dasgupta and Freund 2008) puts rows that are near each other into
common leaves; each split is perpendicular to the line through two rows of the node, so what all rows of a
family share cancels out. Then the neighbors of a row's neighbors are looked at (NN-descent, Dong et al.
2011), which finds what the trees cut apart. Both work on a random projection to few columns; the pairs
that remain are compared in full. Time is linear in the rows, but for the logarithmic depth of the trees;
memory is linear.
"""

import numpy as np

_COLUMNS = 384  # of the projection: distances keep to within some percent
_TREES = 5
_ROUNDS = 2  # of neighbors of neighbors
_LEAF = 256  # rows that are compared all with all
_SPARE = 2  # times as many rows as wanted are compared in full
_BLOCK = 1 << 22  # scalars of a matrix looked at at once: stays in the CPU's cache


def nearest(rows: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """For each row the `count` rows nearest to it, nearest first.

    Args:
      rows: float32 [n, width], of Euclidean length 1 (or 0).
      count: of neighbors; fewer where there are fewer other rows.
      seed: of the projection and the trees.

    Returns:
      Indices int64 [n, k] and squared distances float32 [n, k], k = min(count, n - 1).
    """
    n = len(rows)
    k = min(count, n - 1)
    if k < 1:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    rng = np.random.default_rng(seed)
    small = _projected(rows, rng)
    wide = min(_SPARE * count, n - 1)
    best = _Best(n, wide)
    for _ in range(_TREES if n > _LEAF else 1):
        for leaf in _leaves(small, rng):
            best.compare_all(leaf, small)
    for _ in range(_ROUNDS if n > _LEAF else 0):
        best.neighbors_of_neighbors(small)
    return _in_full(rows, best.rows, k)


def _projected(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [n, columns] with about the distances of `rows`: each column is the sum of every so many-th
    element with random signs (feature hashing, Weinberger et al. 2009), which costs one pass over `rows`.
    Their mean is taken off, since what all have in common would cost the precision of what tells them apart.
    """
    n, width = rows.shape
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    if width <= _COLUMNS:
        return rows - mean
    signs = rng.choice(np.array([-1, 1], np.float32), width)
    folds = -(-width // _COLUMNS)
    out = np.empty((n, _COLUMNS), np.float32)
    step = max(1, _BLOCK // width)
    for at in range(0, n, step):
        part = rows[at : at + step]
        padded = np.zeros((len(part), folds * _COLUMNS), np.float32)
        np.multiply(part - mean, signs, out=padded[:, :width])
        out[at : at + step] = padded.reshape(len(part), folds, _COLUMNS).sum(axis=1)
    return out


def _leaves(small: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Row indices of the leaves of one tree, each at most _LEAF."""
    done, open_ = [], [np.arange(len(small))]
    while open_:
        node = open_.pop()
        if len(node) <= _LEAF:
            done.append(node)
            continue
        one, other = rng.choice(len(node), 2, replace=False)
        line = small[node[one]] - small[node[other]]
        along = small[node] @ line
        half = len(node) // 2
        order = np.argpartition(along, half)  # equal halves: also where all rows are equal
        open_ += [node[order[:half]], node[order[half:]]]
    return done


class _Best:
    """The nearest rows found so far, by distance in the projection."""

    def __init__(self, n: int, count: int):
        self.rows = np.full((n, count), -1, np.int64)
        self._far = np.full((n, count), np.inf, np.float32)

    def compare_all(self, members: np.ndarray, small: np.ndarray) -> None:
        """Compares the rows of a leaf with each other."""
        if len(members) < 2:
            return
        x = small[members]
        x = x - x.mean(axis=0)
        squares = np.vecdot(x, x)
        far = np.maximum(squares[:, None] + squares[None, :] - 2 * (x @ x.T), 0)
        np.fill_diagonal(far, np.inf)
        few = np.argpartition(far, min(self.rows.shape[1], len(far)) - 1, axis=1)
        few = few[:, : self.rows.shape[1]]
        self._take(members, members[few], np.take_along_axis(far, few, axis=1))

    def neighbors_of_neighbors(self, small: np.ndarray) -> None:
        """Looks at the nearest rows of the nearest rows of each, and of those it is a nearest row of."""
        near = self.rows[:, : max(2, self.rows.shape[1] // 2)]
        both = np.concatenate([near, _reverse(near)], axis=1)
        step = max(1, _BLOCK // (both.shape[1] * near.shape[1] * small.shape[1]))
        for at in range(0, len(near), step):
            own = np.arange(at, min(at + step, len(near)))
            found = near[both[own]]
            found[both[own] < 0] = -1
            found = np.concatenate([found.reshape(len(own), -1), both[own]], axis=1)
            apart = small[found] - small[own, None]
            far = np.vecdot(apart, apart)
            far[(found < 0) | (found == own[:, None])] = np.inf
            self._take(own, found, far)

    def _take(self, own: np.ndarray, found: np.ndarray, far: np.ndarray) -> None:
        """Merges candidates [len(own), m] into the best of these rows."""
        count = self.rows.shape[1]
        rows = np.concatenate([self.rows[own], found], axis=1)
        apart = np.concatenate([self._far[own], far], axis=1)
        # A row that is found again counts once: equal indices lie side by side after sorting by index.
        by_row = np.argsort(rows, axis=1, kind="stable")
        sorted_ = np.take_along_axis(rows, by_row, axis=1)
        again = np.zeros(rows.shape, bool)
        again[:, 1:] = sorted_[:, 1:] == sorted_[:, :-1]
        np.put_along_axis(
            apart,
            by_row,
            np.where(again, np.inf, np.take_along_axis(apart, by_row, axis=1)),
            axis=1,
        )
        at = np.argpartition(apart, count - 1, axis=1)[:, :count]
        apart = np.take_along_axis(apart, at, axis=1)
        order = np.argsort(apart, axis=1)
        self._far[own] = np.take_along_axis(apart, order, axis=1)
        kept = np.take_along_axis(np.take_along_axis(rows, at, axis=1), order, axis=1)
        self.rows[own] = np.where(np.isfinite(self._far[own]), kept, -1)


def _reverse(near: np.ndarray) -> np.ndarray:
    """For each row some of the rows that have it in `near` [n, m]: int64 [n, m], -1 where there are fewer."""
    n, m = near.shape
    target, source = near.reshape(-1), np.repeat(np.arange(n), m)
    order = np.argsort(target, kind="stable")
    target, source = target[order], source[order]
    place = np.arange(len(target)) - np.searchsorted(target, target)
    kept = (target >= 0) & (place < m)
    out = np.full((n, m), -1, np.int64)
    out[target[kept], place[kept]] = source[kept]
    return out


def _in_full(rows: np.ndarray, near: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest `count` of the candidates `near` [n, m], by distances of whole rows."""
    far = np.empty(near.shape, np.float32)
    for i, candidates in enumerate(near):
        apart = rows[candidates] - rows[i]
        far[i] = np.vecdot(apart, apart)
    far[near < 0] = np.inf
    order = np.argsort(far, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(near, order, axis=1), np.take_along_axis(far, order, axis=1)
