"""The cases every paged attention backend must get right, and how one is put to it.

`run` writes the cached tokens by a first call of the backend and attends in a second, so the write is
tested too; the first call has rounded sizes and no window, cap or scale, so that cases share its program. The
second can be `rounded` as well: with unused sequences, rows and pages up to sizes that many cases have. Pages
nobody owns and rows that are padding hold NaN (8-bit values: their largest, with NaN scales) before, and the
pages are checked to be untouched after.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.pallas_kernels.paged_attention import reference
from jblock.pallas_kernels.paged_attention.ragged import Ragged

FORMS = ("grid", "packed", "scattered")


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch and one model's shape.

    Attributes:
      sequences: (cached tokens, new tokens) of each.
      form: how rows lie: the engine's grid, runs one behind the other, or runs in another order with
        padding between them.
      heads, kv_heads, head_dim, page_size, window, softcap, scale: as the op names them.
      kv: dtype of the pages.
      q: dtype of queries, keys and values as they come.
      slack: how far max_q_len is over the longest run.
    """

    sequences: tuple[tuple[int, int], ...]
    form: str = "packed"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    kv: str = "float32"
    q: str = "float32"
    slack: int = 0

    def __str__(self) -> str:
        rest = (
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name != "sequences" and getattr(self, f.name) != f.default
        )
        return "-".join(["+".join(f"{c}.{n}" for c, n in self.sequences), *rest]).replace(" ", "")

    @property
    def tolerance(self) -> float:
        """Error allowed, relative to the largest value, of a backend that computes in the dtype of the
        pages (bfloat16 for 8-bit ones)."""
        return 2e-5 if self.q == self.kv == "float32" else 1e-2

    @property
    def max_q_len(self) -> int:
        """Bound on the new tokens of a sequence."""
        return max(1, self.slack + max(n for _, n in self.sequences))


DECODE = ((7, 1), (0, 1), (12, 1))
RAGGED = ((5, 8), (0, 3), (4, 4), (17, 1))
MIXED = ((30, 1), (0, 19), (9, 1), (16, 7), (3, 1))
VERIFY = ((20, 4), (7, 4), (63, 3), (0, 4))
LONG = ((150, 1), (40, 1), (97, 1))

CASES = [
    # Decoding: lengths at and around page edges, unused sequences.
    Case(((0, 1),)),
    Case(((6, 1),)),
    Case(((7, 1),)),
    Case(((8, 1),)),
    Case(DECODE, "grid"),
    Case(DECODE, "scattered"),
    Case(((7, 1), (0, 0), (12, 1), (0, 0)), "grid"),
    Case(((0, 0), (0, 0), (12, 1)), "packed"),
    Case(((0, 0), (9, 0), (12, 1), (3, 0)), "scattered"),
    Case(((0, 0), (0, 0)), "packed", slack=1),
    Case(LONG),
    Case(((255, 1), (256, 1), (257, 1)), page_size=16),
    Case(tuple((3 * i, 1) for i in range(13)), page_size=4),
    # Prefill: whole prompts and chunks, pages filled exactly and overrun by one.
    Case(((0, 8),), "grid"),
    Case(((0, 5),), "grid", slack=3),
    Case(((0, 9),)),
    Case(((0, 16), (0, 15), (0, 17))),
    Case(((8, 8), (16, 8)), "grid"),
    Case(RAGGED, "grid"),
    Case(RAGGED, "packed"),
    Case(RAGGED, "scattered"),
    Case(((0, 0), (9, 7)), "grid", slack=1),
    Case(((0, 70), (33, 40)), page_size=16),
    Case(((120, 33), (0, 65)), page_size=32, head_dim=32),
    Case(((64, 64),), page_size=64, head_dim=64),
    # Mixed batches and verification of guessed tokens.
    Case(MIXED, "grid"),
    Case(MIXED, "packed"),
    Case(MIXED, "scattered"),
    Case(VERIFY, "grid"),
    Case(VERIFY, "packed", page_size=16),
    Case(VERIFY, "scattered", page_size=4),
    Case(((61, 5), (62, 5), (63, 5), (64, 5)), page_size=64),
    # Windows: of one token, inside a page, across pages, longer than everything.
    Case(((16, 1),), window=1),
    Case(((15, 1), (2, 1)), "grid", window=4),
    Case(((40, 1), (7, 1), (8, 1), (9, 1)), window=8),
    Case(LONG, window=30),
    Case(((13, 8), (0, 8)), "grid", window=5),
    Case(((90, 20), (0, 33)), window=16),
    Case(((20, 3),), window=100),
    Case(MIXED, window=9),
    Case(VERIFY, window=6, kv="bfloat16", q="bfloat16"),
    # Soft caps and scales.
    Case(DECODE, softcap=2.0),
    Case(RAGGED, "grid", softcap=50.0),
    Case(MIXED, softcap=1.0, window=7),
    Case(DECODE, scale=1.0),
    Case(RAGGED, scale=0.0625),
    Case(MIXED, scale=0.5, softcap=5.0, window=12, kv="bfloat16", q="bfloat16"),
    # Heads: one to one, all to one, ratios that are no power of two, widths of real models.
    Case(RAGGED, heads=4, kv_heads=4),
    Case(RAGGED, heads=8, kv_heads=1),
    Case(MIXED, heads=1, kv_heads=1),
    Case(MIXED, heads=6, kv_heads=2),
    Case(DECODE, heads=14, kv_heads=2, head_dim=64),
    Case(DECODE, heads=15, kv_heads=5, head_dim=64),
    Case(RAGGED, heads=12, kv_heads=3, head_dim=80),
    Case(MIXED, heads=8, kv_heads=2, head_dim=128, page_size=16),
    Case(DECODE, heads=4, kv_heads=2, head_dim=256, page_size=16),
    Case(DECODE, head_dim=8, page_size=4),
    Case(((1, 1), (127, 1), (128, 2)), page_size=128, head_dim=64),
    # Dtypes of the pages, with queries of both.
    *(
        Case(sequences, form, kv=kv, q=q)
        for kv, q in (
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
            ("int8", "float32"),
            ("int8", "bfloat16"),
            ("float8_e4m3fn", "float32"),
            ("float8_e4m3fn", "bfloat16"),
        )
        for sequences, form in ((DECODE, "grid"), (MIXED, "packed"), (VERIFY, "scattered"))
    ),
    Case(LONG, kv="int8", q="bfloat16", heads=8, kv_heads=2, head_dim=128, page_size=32),
    Case(LONG, kv="float8_e4m3fn", q="bfloat16", heads=8, kv_heads=1, head_dim=64, page_size=32),
    Case(((30, 40),), kv="int8", window=20, page_size=16),
    Case(((30, 40),), kv="bfloat16", q="bfloat16", heads=8, kv_heads=8, head_dim=128, page_size=16),
    Case(MIXED, kv="float32", q="bfloat16"),
    Case(RAGGED, "scattered", kv="int8", softcap=3.0, heads=6, kv_heads=3),
    # The widest heads, with rows enough for all of a kernel's computing threads.
    Case(
        ((0, 40), (33, 25)),
        heads=8,
        head_dim=256,
        page_size=16,
        window=20,
        softcap=5.0,
        kv="bfloat16",
        q="bfloat16",
    ),
]

Attend = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def run(
    case: Case,
    abstract_pages: Callable[..., tuple[Any, ...]],
    attend: Attend,
    seed: int = 0,
    rounded: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts a case to a backend.

    Args:
      case: what to compute.
      abstract_pages: as api.abstract_pages, for the backend.
      attend: as api.paged_attention, for the backend.
      seed: of the random numbers.
      rounded: whether to add to it what makes cases share a program.

    Returns:
      output of the backend and of the reference, real rows only, float32 [rows, heads, d].
    """
    rng = np.random.default_rng(seed)
    if rounded:
        unused = ((0, 0),) * (-len(case.sequences) % 4)
        slack = _power(case.max_q_len) - max(n for _, n in case.sequences)
        case = dataclasses.replace(case, sequences=case.sequences + unused, slack=slack)
    lengths = [cached + new for cached, new in case.sequences]
    table, mine = _give_pages(case, lengths, rng, rounded)
    pages = tuple(
        jnp.asarray(_poisoned(a.shape, a.dtype, mine))
        for a in abstract_pages(
            len(mine), case.page_size, case.kv_heads, case.head_dim, dtype=jnp.dtype(case.kv)
        )
    )
    before = pages

    def draw(count: int, heads: int) -> np.ndarray:
        rows = rng.standard_normal((count, heads, case.head_dim))
        return rows.astype(jnp.dtype(case.q)).astype(np.float32)

    full = [(draw(n, case.heads), draw(n, case.kv_heads), draw(n, case.kv_heads)) for n in lengths]

    def call(starts, q_lens, form, max_q_len, pages, least_rows, options):
        """One call over tokens starts .. starts + q_lens of every sequence; their outputs, in order."""
        row_starts, num_rows = _place_rows(q_lens, form, max_q_len, rng)
        num_rows = max(num_rows, least_rows)
        arrays = []
        for i, heads in enumerate((case.heads, case.kv_heads, case.kv_heads)):
            rows = np.full((num_rows, heads, case.head_dim), np.nan, jnp.dtype(case.q))
            for s, (row, start, n) in enumerate(zip(row_starts, starts, q_lens, strict=True)):
                rows[row : row + n] = full[s][i][start : start + n]
            arrays.append(jnp.asarray(rows))
        ragged = Ragged(
            row_starts=jnp.asarray(row_starts, jnp.int32),
            q_lens=jnp.asarray(q_lens, jnp.int32),
            kv_lens=jnp.asarray(np.add(starts, q_lens), jnp.int32),
            page_table=jnp.asarray(table),
            max_q_len=max_q_len,
            is_grid=form == "grid",
        )
        out, pages = attend(
            *arrays,
            pages,
            ragged,
            **options,
        )
        assert out.dtype == arrays[0].dtype and out.shape == arrays[0].shape
        out = np.asarray(out, np.float32)
        taken = [out[row : row + n] for row, n in zip(row_starts, q_lens, strict=True)]
        return np.concatenate(taken), pages

    cached = [c for c, _ in case.sequences]
    if any(cached):
        rows, longest = (max(256, _power(n)) for n in (sum(cached), max(cached)))
        options = {"sliding_window": None, "softcap": None, "scale": None}
        _, pages = call([0] * len(lengths), cached, "packed", longest, pages, rows, options)
    new = [n for _, n in case.sequences]
    least = max(16, _power(len(new) * case.max_q_len)) if rounded and case.form != "grid" else 1
    options = {"sliding_window": case.window, "softcap": case.softcap, "scale": case.scale}
    got, pages = call(cached, new, case.form, case.max_q_len, pages, least, options)
    for old, now in zip(before, pages, strict=True):
        untouched = ~mine
        untouched[0] = True
        np.testing.assert_array_equal(
            np.asarray(old).view(np.uint8)[untouched],
            np.asarray(now).view(np.uint8)[untouched],
            "the null page or a page nobody owns was written",
        )
    wanted = [np.zeros((0, case.heads, case.head_dim), np.float32)]
    for (start, n), (q, k, v) in zip(case.sequences, full, strict=True):
        if n:
            k, v = (stored(a, case.kv) for a in (k, v))
            wanted.append(reference.attention(q[start:], k, v, start, *options.values()))
    return got, np.concatenate(wanted)


def check(case: Case, got: np.ndarray, wanted: np.ndarray, tolerance: float | None = None) -> None:
    """Fails unless `got` is within the case's tolerance (or the one given) of `wanted`."""
    largest = np.abs(wanted).max(initial=0.0)
    atol = (case.tolerance if tolerance is None else tolerance) * largest
    np.testing.assert_allclose(got, wanted, atol=atol, rtol=0)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """What comes back of float32 rows [n, kv_heads, d] that were stored in a dtype."""
    largest = {"int8": 127, "float8_e4m3fn": 448}.get(dtype)
    if largest is None:
        return x.astype(jnp.dtype(dtype)).astype(np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(largest)
    values = np.clip(x / scale, -largest, largest)
    values = np.round(values) if dtype == "int8" else values.astype(jnp.dtype(dtype))
    return values.astype(np.float32) * scale


def _poisoned(shape: tuple[int, ...], dtype: Any, mine: np.ndarray) -> np.ndarray:
    """Zeros in the pages somebody owns and in the null page, poison elsewhere."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    pages = np.full(shape, jnp.iinfo(dtype).max if integer else np.nan, dtype)
    pages[mine] = 0
    pages[0] = 0
    return pages


def _power(n: int) -> int:
    """The least power of two that is no less."""
    return 1 << (int(n) - 1).bit_length()


def _give_pages(
    case: Case, lengths: list[int], rng: np.random.Generator, rounded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A page table int32 [S, max_pages] of pages in random order, and bool [num_pages] of those owned."""
    counts = [-(-n // case.page_size) for n in lengths]
    max_pages = 4 * -(-(1 + max(counts)) // 4)
    num_pages = 8 * -(-(1 + sum(counts) + 3) // 8)
    if rounded:
        max_pages, num_pages = max(32, _power(max_pages)), max(64, _power(num_pages))
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(lengths), max_pages), np.int32)
    mine = np.zeros(num_pages, bool)
    for s, count in enumerate(counts):
        table[s, :count] = [free.pop() for _ in range(count)]
        mine[table[s, :count]] = True
    return table, mine


def _place_rows(
    q_lens: list[int], form: str, max_q_len: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """First row of every sequence's run, and how many rows there are."""
    count = len(q_lens)
    if form == "grid":
        return [s * max_q_len for s in range(count)], count * max_q_len
    if form == "packed":
        ends = np.cumsum(q_lens)
        return [int(e - n) for e, n in zip(ends, q_lens, strict=True)], max(1, int(ends[-1]))
    starts, row = [0] * count, 0
    for s in rng.permutation(count):
        row += int(rng.integers(0, 3))
        starts[s] = row
        row += q_lens[s]
    return starts, row + 2
