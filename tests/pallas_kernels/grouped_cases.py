"""The cases every backend of the two grouped matmuls must get right, and how one is put to it.

A case can be put as it is or `rounded`: with rows of no group, groups without rows and pieces of nobody added
up to sizes that many cases have, which then share a program. Where compiling one takes most of a case's
time, as in the interpreters, the tables take minutes otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jblock.pallas_kernels.grouped_block_matmul import reference as block_reference
from jblock.pallas_kernels.grouped_delta_matmul import reference as delta_reference


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """Rows of several variants.

    Attributes:
      sizes: rows of each.
      width, out: of the weights.
      dtype: of weights and rows.
      padding: rows of no variant at the end, which hold NaN.
      poisoned: a variant whose weight and rows hold NaN, if any.
    """

    sizes: tuple[int, ...]
    width: int = 128
    out: int = 128
    dtype: str = "float32"
    padding: int = 0
    poisoned: int | None = None

    def __str__(self) -> str:
        name = f"{'+'.join(map(str, self.sizes))}-{self.width}x{self.out}-{self.dtype}"
        return f"{name}-padding{self.padding}" + f"-nan{self.poisoned}" * (
            self.poisoned is not None
        )

    @property
    def tolerance(self) -> float:
        """Error allowed, relative to the largest value."""
        return 2e-5 if self.dtype == "float32" else 1e-2


BOTH = ("float32", "bfloat16")
SIZES = (
    (5,),
    (0, 7),
    (7, 0),
    (0, 0, 3, 0),
    (1, 1, 1, 1),
    (16, 16),
    (15, 17, 16),
    (33, 2, 0, 29),
    (3, 60, 1, 0, 0, 5),
)
BLOCK_CASES = [
    # Groups of every size and none, with and without rows of no variant.
    *(BlockCase(sizes, dtype=dtype) for sizes in SIZES for dtype in BOTH),
    *(BlockCase(sizes, dtype=dtype, padding=5) for sizes in SIZES for dtype in BOTH),
    *(BlockCase((0, 0), dtype=dtype, padding=padding) for dtype in BOTH for padding in (1, 40)),
    # One variant's NaN reaches nobody else.
    *(
        BlockCase(sizes, dtype=dtype, poisoned=nan, padding=3)
        for dtype in BOTH
        for sizes, nan in (((5, 4, 6), 1), ((5, 4, 6), 0), ((20, 0, 20), 2), ((9, 0, 9), 1))
    ),
    # Widths: several blocks of columns, no multiple of a tile, tiny.
    *(BlockCase((9, 0, 23), 256, out, dtype) for out in (256, 384, 640, 96) for dtype in BOTH),
    BlockCase((3, 4), 96, 72),
    BlockCase((3, 4), 24, 8, "bfloat16"),
    BlockCase((3, 4), 7, 5),
    BlockCase((20, 30), 384, 130),
    # Many variants, many rows.
    *(BlockCase((2,) * 24, 128, 256, dtype) for dtype in BOTH),
    *(BlockCase((0, 1, 0, 0, 3, 0, 2, 0) * 4, dtype=dtype, padding=9) for dtype in BOTH),
    BlockCase((130, 61, 0, 65), 128, 256, "bfloat16"),
    BlockCase((64, 64, 64), 128, 128, "bfloat16"),
    BlockCase((300, 0, 9), 128, 128, "bfloat16", padding=5),
]


def round_up(n: int, *sizes: int) -> int:
    """The least of these sizes, ascending, that is no less than n; behind the last, whole multiples of it."""
    return next((s for s in sizes if s >= n), -(-n // sizes[-1]) * sizes[-1])


_ROWS = 16, 48, 96, 192, 256
_GROUPS = 4, 8, 32


def rounded_block(case: BlockCase) -> BlockCase:
    """The case with rows of no variant and variants without rows up to sizes that many have."""
    rows = sum(case.sizes)
    none = (0,) * (round_up(len(case.sizes), *_GROUPS) - len(case.sizes))
    padding = round_up(rows + case.padding, *_ROWS) - rows
    return dataclasses.replace(case, sizes=case.sizes + none, padding=padding)


def make_block(case: BlockCase, seed: int = 0) -> tuple[Any, Any, Any]:
    """x, weights and group_sizes of a case."""
    rng = np.random.default_rng(seed)
    total = sum(case.sizes)
    x = rng.standard_normal((total + case.padding, case.width), np.float32)
    x[total:] = np.nan
    weights = [rng.standard_normal((case.out, case.width), np.float32) for _ in case.sizes]
    if case.poisoned is not None:
        weights[case.poisoned][:] = np.nan
        begin = sum(case.sizes[: case.poisoned])
        x[begin : begin + case.sizes[case.poisoned]] = np.nan
    arrays = tuple(jnp.asarray(w, case.dtype) for w in weights)
    return jnp.asarray(x, case.dtype), arrays, jnp.asarray(case.sizes, jnp.int32)


def hold_block(
    case: BlockCase, multiply: Callable[..., Any], seed: int = 0, rounded: bool = False
) -> None:
    """Fails unless `multiply`, as api.grouped_block_matmul, agrees with the reference."""
    case = rounded_block(case) if rounded else case
    x, weights, sizes = make_block(case, seed)
    got = multiply(x, weights, sizes)
    assert got.shape == (x.shape[0], case.out) and got.dtype == jnp.float32
    weights = [w.astype(jnp.float32) for w in weights]
    wanted = block_reference.grouped_block_matmul(x.astype(jnp.float32), weights, case.sizes)
    close(np.asarray(got), wanted, case.tolerance)


@dataclasses.dataclass(frozen=True)
class DeltaCase:
    """Rows of several adapters.

    Attributes:
      groups: (rows, pieces of the adapter) of each group.
      width, out: of the projection.
      rank: of a piece.
      dtype: of the tables; rows of x come in it.
      padding: rows of no group at the end, which hold NaN.
      poisoned: a group whose pieces hold NaN, if any.
      slack: how many columns of the table of pieces nobody needs.
    """

    groups: tuple[tuple[int, int], ...]
    width: int = 128
    out: int = 128
    rank: int = 8
    dtype: str = "float32"
    padding: int = 0
    poisoned: int | None = None
    slack: int = 0

    def __str__(self) -> str:
        rest = (
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name != "groups" and getattr(self, f.name) != f.default
        )
        return "-".join(["+".join(f"{n}.{p}" for n, p in self.groups), *rest])

    @property
    def tolerance(self) -> float:
        """Error allowed, relative to the largest value."""
        return 2e-5 if self.dtype == "float32" else 1e-2


GROUPS = (
    ((5, 1),),
    ((5, 0),),
    ((1, 1), (1, 2), (1, 0), (1, 3)),
    ((0, 2), (7, 1), (0, 0)),
    ((8, 1), (8, 2), (8, 0)),
    ((3, 2), (9, 1), (0, 3), (11, 4), (2, 0)),
    ((33, 3), (40, 0), (17, 1)),
    ((2, 1), (30, 0), (2, 5)),
)
DELTA_CASES = [
    # Groups of every size and rank, of no adapter and of no rows; with rows of no group.
    *(DeltaCase(groups, dtype=dtype) for groups in GROUPS for dtype in BOTH),
    *(DeltaCase(groups, dtype=dtype, padding=4) for groups in GROUPS for dtype in BOTH),
    # Edges of ranks: of a piece, of an adapter, of the table.
    *(DeltaCase(((3, n), (4, 1)), dtype=dtype) for n in (2, 4, 5, 8, 9) for dtype in BOTH),
    *(DeltaCase(GROUPS[5], rank=rank) for rank in (16, 32)),
    *(DeltaCase(GROUPS[2], dtype=dtype, slack=3) for dtype in BOTH),
    DeltaCase(((4, 0), (4, 0)), slack=2),
    # One adapter's NaN reaches nobody else.
    *(
        DeltaCase(groups, dtype=dtype, poisoned=nan, padding=3)
        for dtype in BOTH
        for groups, nan in ((GROUPS[2], 1), (GROUPS[5], 0), (GROUPS[5], 3), (GROUPS[7], 2))
    ),
    # Widths, narrow and wide and no multiple of a tile.
    *(
        DeltaCase(GROUPS[5], width, out)
        for width, out in ((256, 640), (96, 72), (24, 8), (40, 130))
    ),
    *(
        DeltaCase(GROUPS[2], width, out, dtype="bfloat16")
        for width, out in ((256, 384), (96, 72), (384, 96))
    ),
    # Many groups, many rows.
    DeltaCase(tuple((1, i % 4) for i in range(32)), dtype="bfloat16"),
    DeltaCase(tuple((i % 5, 1 + i % 3) for i in range(20))),
    DeltaCase(((130, 2), (70, 3)), dtype="bfloat16"),
    DeltaCase(((256, 2),), 128, 256, dtype="bfloat16"),
]


def rounded_delta(case: DeltaCase) -> DeltaCase:
    """The case with rows of no group, groups without rows and unused columns of the table of pieces up to
    sizes that many have."""
    rows, most = sum(n for n, _ in case.groups), max(p for _, p in case.groups)
    none = ((0, 0),) * (round_up(len(case.groups), *_GROUPS) - len(case.groups))
    padding = round_up(rows + case.padding, *_ROWS) - rows
    slack = round_up(most + case.slack, 4, 8) - most
    return dataclasses.replace(case, groups=case.groups + none, padding=padding, slack=slack)


def make_delta(case: DeltaCase, seed: int = 0) -> tuple[Any, ...]:
    """y, x, a, b, pieces and group_sizes of a case. Piece 0 is zeros, pieces nobody has are NaN."""
    rng = np.random.default_rng(seed)
    total = sum(n for n, _ in case.groups)
    count = round_up(sum(p for _, p in case.groups) + 4, 16, 64)
    y = rng.standard_normal((total + case.padding, case.out), np.float32)
    x = rng.standard_normal((total + case.padding, case.width), np.float32)
    x[total:] = y[total:] = np.nan
    a = np.full((count, case.rank, case.width), np.nan, np.float32)
    b = np.full((count, case.rank, case.out), np.nan, np.float32)
    a[0] = b[0] = 0
    free = list(rng.permutation(np.arange(1, count)))
    turns = max(1, max(p for _, p in case.groups) + case.slack)
    pieces = np.zeros((len(case.groups), turns), np.int32)
    for g, (_, number) in enumerate(case.groups):
        pieces[g, :number] = [free.pop() for _ in range(number)]
        if g != case.poisoned:
            for p in pieces[g, :number]:
                a[p] = rng.standard_normal(a.shape[1:])
                b[p] = rng.standard_normal(b.shape[1:]) / 8
    return (
        jnp.asarray(y),
        *(jnp.asarray(v, case.dtype) for v in (x, a, b)),
        jnp.asarray(pieces),
        jnp.asarray([n for n, _ in case.groups], jnp.int32),
    )


def hold_delta(
    case: DeltaCase, multiply: Callable[..., Any], seed: int = 0, rounded: bool = False
) -> None:
    """Fails unless `multiply`, as api.grouped_delta_matmul, agrees with the reference."""
    case = rounded_delta(case) if rounded else case
    y, x, a, b, pieces, sizes = make_delta(case, seed)
    wanted = delta_reference.grouped_delta_matmul(
        y, *(v.astype(jnp.float32) for v in (x, a, b)), np.asarray(pieces), np.asarray(sizes)
    )
    got = multiply(y, x, a, b, pieces, sizes)
    assert got.shape == wanted.shape and got.dtype == jnp.float32
    close(np.asarray(got), wanted, case.tolerance)


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Fails unless they differ by at most that share of the largest value, and are NaN in the same rows."""
    lost = np.isnan(wanted).any(axis=1)
    np.testing.assert_array_equal(np.isnan(got).any(axis=1), lost, "other rows are NaN")
    atol = tolerance * np.abs(wanted[~lost]).max(initial=0.0)
    np.testing.assert_allclose(got[~lost], wanted[~lost], atol=atol, rtol=0)
