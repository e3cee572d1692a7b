"""Every paged attention backend against the float32 reference, on poisoned padding and pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.blocks.rows import Rows
from jblock.pallas_kernels.paged_attention import api, reference

TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences as (cached tokens, new tokens); the rest is the model's shape."""

    sequences: tuple[tuple[int, int], ...]
    q_len: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    page_size: int = 4
    window: int | None = None
    dtype: str = "float32"


CASES = [
    Case(((0, 1),), 1),
    Case(((3, 1),), 1),
    Case(((4, 1),), 1),
    Case(((7, 1), (0, 1), (12, 1)), 1),
    Case(((7, 1), (0, 0), (12, 1), (0, 0)), 1),
    Case(((0, 8),), 8),
    Case(((0, 5),), 8),
    Case(((5, 8), (0, 3), (4, 4)), 8),
    Case(((0, 0), (9, 7)), 8),
    Case(((0, 8), (8, 8)), 8, heads=4, kv_heads=4),
    Case(((3, 5),), 8, heads=8, kv_heads=1),
    Case(((15, 1), (2, 1)), 1, window=4),
    Case(((16, 1),), 1, window=1),
    Case(((13, 8), (0, 8)), 8, window=5),
    Case(((20, 3),), 4, window=100),
    Case(((1, 1), (63, 1)), 1, page_size=64),
    Case(((60, 16),), 16, page_size=64, head_dim=32),
    Case(((7, 1), (0, 0), (12, 1), (0, 0)), 1, dtype="int8"),
    Case(((5, 8), (0, 3), (4, 4)), 8, dtype="int8"),
    Case(((13, 8), (0, 8)), 8, window=5, dtype="int8"),
    Case(((60, 16),), 16, heads=8, kv_heads=1, page_size=64, head_dim=32, dtype="int8"),
]


@functools.partial(jax.jit, static_argnums=(6, 7))
def attend(q, k, v, pages, table, rows, window, backend):
    """The public function, compiled once per shape."""
    return api.paged_attention(q, k, v, pages, table, rows, sliding_window=window, backend=backend)


def poisoned(array: jax.ShapeDtypeStruct, mine: np.ndarray) -> jax.Array:
    """Pages that are zero where they are owned and the worst their dtype has elsewhere."""
    worst = np.nan if array.dtype == jnp.float32 else -128
    owned = mine.reshape(-1, *[1] * (len(array.shape) - 1))
    return jnp.asarray(np.where(owned, 0, np.full(array.shape, worst)), array.dtype)


def rounded(x: np.ndarray) -> np.ndarray:
    """What int8 pages hold of [tokens, heads, d], by the rule of api.py's contract."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.round(x / scale) * scale


def run(case: Case, backend: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(output of the backend, output of the reference), real rows only, [rows, heads, d]."""
    rng = np.random.default_rng(seed)
    lengths = [cached + new for cached, new in case.sequences]
    max_pages = 1 + max(5, *(-(-n // case.page_size) for n in lengths))
    num_pages = 1 + max_pages * len(lengths) + 2
    arrays = api.abstract_pages(
        num_pages,
        case.page_size,
        case.kv_heads,
        case.head_dim,
        dtype=case.dtype,
        backend=backend,
    )
    # Pages nobody owns are poison; an owner's pages start as zeros; page 0 is the null page.
    free = rng.permutation(np.arange(1, num_pages))
    table = np.zeros((len(lengths), max_pages), np.int32)
    owned = [0]
    for s, n in enumerate(lengths):
        count = -(-n // case.page_size)
        table[s, :count], free = free[:count], free[count:]
        owned.extend(table[s, :count])
    mine = np.isin(np.arange(num_pages), owned)
    pages = tuple(poisoned(a, mine) for a in arrays)

    def draw(count, heads):
        return rng.standard_normal((count, heads, case.head_dim)).astype(np.float32)

    full = [(draw(n, case.heads), draw(n, case.kv_heads), draw(n, case.kv_heads)) for n in lengths]

    def call(q_len, starts, q_lens, pages):
        """One call over tokens starts .. starts + q_lens of every sequence."""
        rows = Rows(
            num_seqs=len(lengths),
            q_len=q_len,
            starts=jnp.asarray(starts, jnp.int32),
            q_lens=jnp.asarray(q_lens, jnp.int32),
            slots=jnp.zeros(len(lengths), jnp.int32),
        )

        def grid(i, heads):
            out = np.full((len(lengths), q_len, heads, case.head_dim), np.nan, np.float32)
            for s, (a, n) in enumerate(zip(starts, q_lens, strict=True)):
                out[s, :n] = full[s][i][a : a + n]
            return jnp.asarray(out)

        new = grid(0, case.heads), grid(1, case.kv_heads), grid(2, case.kv_heads)
        return attend(*new, pages, jnp.asarray(table), rows, case.window, backend)

    cached = [c for c, _ in case.sequences]
    if max(cached):
        _, pages = call(max(13, *cached), [0] * len(lengths), cached, pages)
    out, pages = call(case.q_len, cached, [n for _, n in case.sequences], pages)
    assert np.all(np.asarray(pages[1])[0] == 0), "the null page was written"
    for array, before in zip(pages, arrays, strict=True):
        wanted_pages = np.asarray(poisoned(before, mine))[~mine]
        assert np.array_equal(np.asarray(array)[~mine], wanted_pages, equal_nan=True), (
            "a page nobody owns was written"
        )
    got, wanted = [], []
    for s, (start, n) in enumerate(case.sequences):
        if n:
            q, k, v = full[s]
            got.append(np.asarray(out)[s, :n])
            if case.dtype == "int8":
                k, v = rounded(k), rounded(v)
            wanted.append(reference.attention(q[start:], k, v, start, case.window))
    return np.concatenate(got), np.concatenate(wanted)


@pytest.mark.parametrize("backend", sorted(api.BACKENDS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, backend):
    got, wanted = run(case, backend)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 4)), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 4, 6]),
    dtype=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_batches(sequences, window, dtype, seed):
    sequences = (*sequences, (1, 1))
    got, wanted = run(Case(tuple(sequences), 4, window=window, dtype=dtype), "xla", seed)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)
