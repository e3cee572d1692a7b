"""The op's machine code for the CPU against the reference, and what it promises beyond."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="the extra jblock[cpu] is not installed")

from jblock.cpu_kernels import targets
from jblock.cpu_kernels.paged_attention import form as forms
from jblock.pallas_kernels import backends
from jblock.pallas_kernels.paged_attention import api, xla
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from tests.pallas_kernels.attention_cases import CASES, FORMS, Case, check, run

PAGES = functools.partial(api.abstract_pages, backend="cpu")
ATTEND = jax.jit(
    functools.partial(api.paged_attention, backend="cpu"),
    static_argnames=("sliding_window", "softcap", "scale"),
)


# `make test` takes the odd ones, where it takes the even ones of the XLA backend, which serves fp8 here too.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.long] * (i % 2 == 0), id=str(c))
        for i, c in enumerate(CASES)
        if c.kv != "float8_e4m3fn"
    ],
)
def test_matches_reference(case):
    got, wanted = run(case, PAGES, ATTEND)
    check(case, got, wanted, 2e-5 if case.q == "float32" and case.kv != "bfloat16" else None)


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 4)), min_size=3, max_size=3),
    form=st.sampled_from(FORMS),
    window=st.sampled_from([None, 4]),
    kv=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_batches(sequences, form, window, kv, seed):
    case = Case((*sequences, (14, 4)), form, window=window, kv=kv, page_size=4, head_dim=8)
    got, wanted = run(case, PAGES, ATTEND, seed)
    check(case, got, wanted, 2e-5)


@pytest.mark.parametrize("kv", ["float32", "int8"])
@pytest.mark.parametrize("page", [48, 64, 128])
def test_matches_reference_with_any_number_of_vectors_in_the_last_page(page, kv):
    cached = range(5, 2 * page, 16)
    case = Case(tuple((n, 1) for n in cached), FORMS[0], kv=kv, page_size=page, head_dim=32)
    got, wanted = run(case, PAGES, ATTEND)
    check(case, got, wanted, 2e-5)


class Batch:
    """Eight sequences, decoding or not, of a context long enough for XLA's other threads to help."""

    heads, kv_heads, d, page, num_seqs, max_pages = 8, 4, 64, 64, 8, 9

    def __init__(self, q_len: int, kv: str = "float32"):
        rng = np.random.default_rng(3)
        self.q_len = q_len
        rows = self.num_seqs * q_len
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        self.q = draw(rows, self.heads, self.d)
        self.k, self.v = draw(rows, self.kv_heads, self.d), draw(rows, self.kv_heads, self.d)
        count = self.num_seqs * self.max_pages + 1
        shapes = PAGES(count, self.page, self.kv_heads, self.d, dtype=kv)
        self.pages = tuple(
            jnp.asarray(
                rng.integers(-5, 5, a.shape) if a.dtype == jnp.int8 else draw(*a.shape)
            ).astype(a.dtype)
            for a in shapes
        )
        table = 1 + np.arange(count - 1, dtype=np.int32).reshape(self.num_seqs, self.max_pages)
        self.table = jnp.asarray(table)
        self.starts = jnp.asarray([500, 17, 0, 300, 449, 64, 63, 511 - q_len], jnp.int32)

    def attend(self, used: np.ndarray, attend=ATTEND) -> np.ndarray:
        """[num_seqs, q_len, heads, d], with those sequences alone."""
        q_lens = jnp.asarray(np.where(used, self.q_len, 0), jnp.int32)
        ragged = Ragged.grid(self.starts, q_lens, self.table, self.q_len)
        out, _ = attend(self.q, self.k, self.v, self.pages, ragged)
        return np.asarray(out).reshape(self.num_seqs, self.q_len, self.heads, self.d)


@pytest.mark.parametrize("q_len, kv", [(1, "float32"), (1, "int8"), (33, "float32")])
def test_a_row_has_the_same_bits_whatever_its_neighbors_and_threads(q_len, kv):
    batch = Batch(q_len, kv)
    everybody = np.ones(batch.num_seqs, bool)
    together = batch.attend(everybody)
    for s in range(batch.num_seqs):
        alone = batch.attend(np.arange(batch.num_seqs) == s)
        np.testing.assert_array_equal(alone[s].view(np.int32), together[s].view(np.int32))
        # What is not used is zero, never whatever memory held.
        assert not np.delete(alone, s, axis=0).any()


@pytest.mark.parametrize("grid", [True, False])
def test_wrong_ids_rows_and_lengths_stay_within_the_arrays(grid):
    """Sequences 1 to 3 name what is not there; sequence 0 and its pages must not notice."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shapes = PAGES(5, 8, 2, 16)
    pages = tuple(draw(*a.shape) for a in shapes)
    table = jnp.asarray([[1, 2], [900_000_000, 3], [-7, 3], [4, 4]], jnp.int32)
    q, k, v = draw(8, 4, 16), draw(8, 2, 16), draw(8, 2, 16)
    ragged = Ragged(
        row_starts=jnp.asarray([0, 2, 4, 6], jnp.int32),
        q_lens=jnp.asarray([2, 2, 2, 2], jnp.int32),
        kv_lens=jnp.asarray([9, 9, 9, 2_000_000_000], jnp.int32),
        page_table=table,
        max_q_len=2,
        is_grid=grid,
    )
    if not grid:
        starts = jnp.asarray([0, 1 << 30, -(1 << 30), 7], jnp.int32)
        lens = jnp.asarray([2, 2, -5, 1 << 30], jnp.int32)
        ragged = dataclasses.replace(ragged, row_starts=starts, q_lens=lens)
    out, after = ATTEND(q, k, v, pages, ragged)
    alone = dataclasses.replace(ragged, q_lens=jnp.asarray([2, 0, 0, 0], jnp.int32))
    wanted, after_alone = ATTEND(q, k, v, pages, alone)
    np.testing.assert_array_equal(out[:2], wanted[:2])
    for got, before in zip(after, after_alone, strict=True):
        np.testing.assert_array_equal(got[:3], before[:3])


def test_many_calls_at_once_neither_wait_for_each_other_nor_mix():
    batch = Batch(1)
    everybody = np.ones(batch.num_seqs, bool)
    wanted = batch.attend(everybody)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(batch.attend, everybody) for _ in range(200)]
        for call in calls:
            np.testing.assert_array_equal(call.result(timeout=60), wanted)


def test_what_has_no_machine_code_is_xlas():
    pages = tuple(jnp.zeros(a.shape, a.dtype) for a in PAGES(4, 8, 2, 16, dtype="float8_e4m3fn"))
    ragged = Ragged.grid(
        jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32), jnp.ones((2, 2), jnp.int32), 1
    )
    q, k = jnp.ones((2, 4, 16)), jnp.ones((2, 2, 16))
    assert "custom_call" not in ATTEND.lower(q, k, k, pages, ragged).as_text()
    wanted, _ = xla.paged_attention(
        q, k, k, pages, ragged, sliding_window=None, softcap=None, scale=0.25
    )
    np.testing.assert_array_equal(ATTEND(q, k, k, pages, ragged)[0], wanted)


def test_a_form_survives_its_name():
    form = forms.Form(
        kv="int8", d=80, groups=7, page=32, grid=True, rows=4, window=9, softcap=50.0, scale=0.1
    )
    again = forms.Form.parse(form.fields)
    assert again.fields == form.fields and abs(again.scale - form.scale) < 1e-8


@pytest.mark.parametrize("groups, q_len, rows", [(1, 1, 1), (2, 1, 2), (8, 1, 4), (2, 512, 6)])
def test_rows_share_what_was_loaded(monkeypatch, groups, q_len, rows):
    monkeypatch.setattr(targets, "accumulators", lambda: 24)
    assert forms.rows_at_once(groups, q_len) == rows


def test_an_op_without_machine_code_takes_xlas():
    assert backends.module("paged_attention", "cpu").__name__.endswith(".cpu")
    assert backends.module("quantized_matmul", "cpu").__name__.endswith(".xla")


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_rows_of_one_sequence_may_be_neighbors_in_a_grid(kv):
    """Drafted tokens are verified so: each sees those before it, bit for bit as if they had come one by one,
    while XLA's other threads help."""
    heads, kv_heads, d, page = 4, 2, 32, 16
    # Of three sequences five, one and two rows, from these positions on; then padding. One begins in the last
    # token of a page, and two have their first page in common.
    runs, starts = [(0, 5), (1, 1), (2, 2)], [159, 144, 150]
    owner = np.repeat(*np.array(runs).T)
    first = np.concatenate([starts[s] + np.arange(n) for s, n in runs]).astype(np.int32)
    tables = 1 + np.arange(3 * 12, dtype=np.int32).reshape(3, 12)
    tables[1, 0] = tables[0, 0]
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shapes = PAGES(3 * 12 + 1, page, kv_heads, d, dtype=kv)
    empty = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def call(q, k, v, pages, starts, table, q_lens=None):
        q_lens = np.ones(len(starts), np.int32) if q_lens is None else q_lens
        grid = Ragged.grid(jnp.asarray(starts), jnp.asarray(q_lens), jnp.asarray(table), 1)
        return ATTEND(q, k, v, pages, grid)

    pages = tuple(empty)
    for at in range(160):  # what is cached
        rows = draw(3, heads, d), draw(3, kv_heads, d), draw(3, kv_heads, d)
        alive = np.array([at < s for s in starts], np.int32)
        _, pages = call(*rows, pages, np.full(3, at, np.int32), tables, alive)
    q, k, v = draw(10, heads, d), draw(10, kv_heads, d), draw(10, kv_heads, d)
    table = np.zeros((10, 12), np.int32)
    table[:8] = tables[owner]
    q_lens = np.array([1] * 8 + [0] * 2, np.int32)
    together, after = call(q, k, v, pages, np.append(first, [0, 0]).astype(np.int32), table, q_lens)
    for r in range(8):
        own = lambda a, r=r: a[r : r + 1]
        alone, pages = call(own(q), own(k), own(v), pages, own(first), own(table))
        np.testing.assert_array_equal(together[r], alone[0])
    for got, wanted in zip(after, pages, strict=True):
        np.testing.assert_array_equal(got, wanted)
