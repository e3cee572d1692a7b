"""The TPU kernel in jax's TPU interpreter (`tpu_interpreter`).

`make test` takes one case of each dtype and as many more as meet every form and feature;
`make test-long` takes all, rounded to sizes that many share: with small blocks and with the heuristic's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention import (
    shapes,
    tpu,
    tpu_blocks,
    tpu_many_rows,
    tpu_refs,
    tpu_softmax,
)
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.tpu_blocks import Blocks, Shape
from tests.pallas_kernels import faults
from tests.pallas_kernels.attention_cases import CASES, FORMS, Case, check, run
from tests.pallas_kernels.tpu_interpreter import FAST, INTERPRET, RACE, bound_mappings

WINDOWED = next(c for c in CASES if c.window and c.max_q_len == 4)
SPREAD = list(dict.fromkeys([WINDOWED, *CASES[22::24], *{c.kv: c for c in CASES}.values()]))


@functools.partial(
    jax.jit,
    static_argnames=("sliding_window", "softcap", "scale", "blocks"),
    compiler_options=FAST,
)
def interpreted(q, k, v, pages, ragged, *, sliding_window, softcap, scale, blocks=None):
    return tpu.paged_attention(
        q,
        k,
        v,
        pages,
        ragged,
        sliding_window=sliding_window,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        blocks=blocks,
        interpret=INTERPRET,
        device_kind="none",
    )


def pages_of(*sizes, dtype):
    return tpu.abstract_pages(*sizes, dtype)


def small(case: Case) -> Blocks:
    """Blocks so small that a case of a few tokens takes several items, blocks and chunks; in the arrangement
    for many rows where a sequence has more tokens than a draft."""
    return Blocks(
        q_tokens=1 if case.max_q_len == 1 else 4,
        q_tiles=2,
        kv_pages=4,
        chunk_pages=max(1, 16 // case.page_size),
        many_rows=case.max_q_len > 4,
    )


def put(case: Case, blocks: Blocks | None, seed: int = 0, rounded: bool = False) -> None:
    """Runs a case with these blocks; the call that fills the cache takes the heuristic's, which are
    large and so soon interpreted. rounded: as of `run`."""

    def attend(q, k, v, pages, ragged, **options):
        cut = blocks if ragged.max_q_len == case.max_q_len else None
        return interpreted(q, k, v, pages, ragged, blocks=cut, **options)

    got, wanted = run(case, pages_of, attend, seed, rounded)
    check(case, got, wanted)


def hold(case: Case, blocks: Blocks | None, capfd, rounded: bool = False) -> None:
    put(case, blocks, rounded=rounded)
    assert RACE not in "".join(capfd.readouterr())


def test_the_spread_meets_everything():
    assert {c.kv for c in SPREAD} == {c.kv for c in CASES}
    assert {c.q for c in SPREAD} == {c.q for c in CASES}
    assert {c.form for c in SPREAD} == set(FORMS)
    for feature in ("window", "softcap", "scale"):
        assert any(getattr(c, feature) is not None for c in SPREAD)
    # Windows that are behind all rows of a strip at their edge, and one that is not.
    many = [(c, small(c)) for c in SPREAD if c.window and small(c).many_rows]
    spans = [b.q_tokens + b.chunk_pages * c.page_size for c, b in many]
    assert {c.window < span for (c, _), span in zip(many, spans, strict=True)} == {False, True}


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_of_one_token_would_be_caught(fault):
    """By the cases of `make test`, in both arrangements of the kernel."""
    for many in (False, True):
        cases = [c for c in SPREAD if small(c).many_rows == many]
        assert faults.caught(faults.FAULTS[fault], cases), many


def test_faults_are_told_from_what_is_right():
    assert all(faults.right_is_the_reference(c) for c in SPREAD if c.sequences[0][1])
    assert not faults.caught(faults._sees, SPREAD)


def has_more(case: Case) -> bool:
    """Whether there is more to a case than lengths; `make test-long` has the others."""
    return bool(case.window or case.softcap) or case.kv not in ("float32", "bfloat16")


@pytest.mark.parametrize("case", filter(has_more, SPREAD), ids=str)
def test_matches_reference(case, capfd):
    hold(case, small(case), capfd, rounded=True)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_matches_reference(case, capfd):
    """With small blocks and with the heuristic's; what fills the cache is compiled once for both."""
    hold(case, small(case), capfd, rounded=True)
    hold(case, None, capfd, rounded=True)


@pytest.mark.parametrize("groups, wide, narrow", [(1, 1, 2), (3, 4, 4), (8, 8, 8), (9, 16, 16)])
def test_groups_are_padded_to_what_a_register_tile_can_have(groups, wide, narrow):
    assert tpu.padded_groups(groups, jnp.dtype("float32")) == wide
    assert tpu.padded_groups(groups, jnp.dtype("bfloat16")) == narrow


@pytest.mark.parametrize("page_size", [16, 64, 128, 192])
def test_pages_are_whole_lanes(page_size):
    """Else XLA lays them otherwise, and copies the pool to the kernel's layout and back in every call."""
    for array in pages_of(5, page_size, 2, 80, dtype=jnp.dtype("int8")):
        assert array.shape[-1] % 128 == 0 and array.shape[-1] >= min(page_size, 128)


@pytest.mark.parametrize("max_pages, fits", [(3900, True), (4096, False)])
def test_a_page_table_over_scalar_memory_is_refused(max_pages, fits):
    pages = pages_of(9, 64, 2, 128, dtype=jnp.dtype("bfloat16"))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    row = jax.ShapeDtypeStruct((64, 2, 128), jnp.float32)
    table = ints((64, max_pages))

    def attend(q, k, v, pages, lens, table):
        ragged = Ragged.grid(lens, lens, table, 1)
        options = {"sliding_window": None, "softcap": None, "scale": 1.0, "device_kind": "none"}
        return tpu.paged_attention(q, k, v, pages, ragged, **options)

    trace = functools.partial(jax.eval_shape, attend, row, row, row, pages, ints((64,)), table)
    if fits:
        trace()
    else:
        with pytest.raises(
            ValueError, match=r"64 sequences by 4096 pages.*give a larger page_size"
        ):
            trace()


@pytest.mark.parametrize(
    "wrong",
    [
        {"page_table": 99},
        {"page_table": -1},
        {"page_table": 0},
        {"row_starts": 6},
        {"row_starts": -1},
        {"q_lens": 7},
        {"q_lens": -3},
        {"kv_lens": 40},
        {"kv_lens": 0},
    ],
    ids=str,
)
def test_what_points_outside_the_arrays_is_not_followed(wrong):
    """No copy of the kernel is checked on a TPU. Here the interpreter raises for one outside its arrays."""
    rng = np.random.default_rng(0)
    lists = {"row_starts": [0, 1, 2], "q_lens": [1, 1, 1], "kv_lens": [9, 17, 3]}
    table = np.asarray([[1, 2, 3, 4], [5, 6, 7, 0], [8, 0, 0, 0]], np.int32)
    (empty,) = pages_of(12, 8, 2, 16, dtype=jnp.dtype("float32"))
    pages = rng.standard_normal(empty.shape).astype(np.float32)
    q, k, v = (rng.standard_normal((6, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    blocks = Blocks(q_tokens=1, q_tiles=2, kv_pages=4, chunk_pages=2)

    def attend(lists, table):
        batch = {name: jnp.asarray(of, jnp.int32) for name, of in lists.items()}
        ragged = Ragged(**batch, page_table=jnp.asarray(table), max_q_len=2)
        options = {"sliding_window": None, "softcap": None, "scale": None, "blocks": blocks}
        out, (written,) = interpreted(q, k, v, (jnp.asarray(pages),), ragged, **options)
        return np.asarray(out), np.asarray(written)

    wanted, right = attend({**lists, "q_lens": [1, 0, 1]}, table)
    (field, value), *_ = wrong.items()
    if field == "page_table":
        table = np.where(np.arange(3)[:, None] == 1, value, table).astype(np.int32)
    else:
        lists[field] = [lists[field][0], value, lists[field][2]]
    got, written = attend(lists, table)
    np.testing.assert_array_equal(written, right)
    np.testing.assert_array_equal(got[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("window", [None, 1, 40, 191, 192, 500, 1024])
@pytest.mark.parametrize("chunk_pages", [1, 4])
def test_every_key_that_is_seen_has_its_turn_and_its_mask(window, chunk_pages):
    """Strips at the window's edge hide nothing for being later, those at the diagonal nothing behind it."""
    blocks = Blocks(q_tokens=64, q_tiles=1, kv_pages=8, chunk_pages=chunk_pages, many_rows=True)
    form = tpu_softmax.Form(
        blocks=blocks,
        kv_heads=1,
        groups=2,
        head_dim=128,
        tile=16,
        page_size=128,
        scaled=False,
        dtype=jnp.bfloat16,
        sliding_window=window,
        softcap=None,
        scale=1.0,
    )
    strip = 128
    # Tiles of one token, and whole ones, from all positions before, in and behind the block.
    q_first = np.tile(np.arange(-64, 2200, dtype=np.int32), 2)
    q_last = q_first + np.repeat(np.asarray([0, 63], np.int32), q_first.size // 2)
    found = tpu_many_rows.stretches(form, strip, jnp.asarray(q_first), jnp.asarray(q_last))
    key, first, last = np.arange(form.block), q_first[:, None], q_last[:, None]
    edge, whole, diagonal = (
        (key >= np.asarray(begin)[:, None] * unit) & (key < np.asarray(end)[:, None] * unit)
        for (begin, end), unit in zip(found, (strip, form.chunk, strip), strict=True)
    )
    behind = (lambda q: key <= q - window) if window else (lambda q: np.zeros(1, bool))
    turns = edge.astype(int) + whole + diagonal
    assert turns.max() == 1
    assert np.all(turns[(key <= last) & ~behind(first)] == 1), "some row sees it"
    assert not np.any(whole & (behind(last) | (key > first)))
    assert not np.any(diagonal & behind(last))
    if window is None or window >= blocks.q_tokens + strip:
        assert not np.any(edge & (key > first))


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=3, max_size=3)


def random_case(sequences, form, window, kv):
    # The last sequence fixes max_q_len and the size of the page table, and so the program.
    return Case((*sequences, (41, 9)), form, window=window, kv=kv)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    sequences=LENGTHS,
    form=st.sampled_from(FORMS),
    window=st.sampled_from([None, 1, 7, 20]),
    kv=st.sampled_from(["float32", "int8", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_many_random_batches(sequences, form, window, kv, seed):
    case = random_case(sequences, form, window, kv)
    put(case, small(case), seed)
    bound_mappings()


def test_races_would_be_detected(capfd):
    """A kernel that reads a buffer before its copy is waited for."""

    def kernel(x, out, buffer, sem):
        copy = pltpu.make_async_copy(x, buffer, sem)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    x = jnp.zeros((8, 128), jnp.float32)
    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=INTERPRET,
    )
    raised = ""
    try:
        call(x).block_until_ready()
    except jax.errors.JaxRuntimeError as e:  # jax 0.12; before, it is only printed
        raised = str(e)
    assert RACE in raised + "".join(capfd.readouterr())


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("batch", shapes.BATCHES, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["float32", *shapes.DTYPES])
def test_the_heuristic_fits_vector_memory(model, batch, dtype):
    shape = Shape(
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        page_size=shapes.PAGE_SIZE,
        kv_dtype=dtype,
        max_q_len=batch.max_q_len,
    )
    blocks = tpu_blocks.heuristic(shape)
    item = jnp.dtype(dtype).itemsize
    compute = jnp.dtype("float32" if dtype == "float32" else "bfloat16")
    page = jax.ShapeDtypeStruct((9, 2 * model.kv_heads, shapes.PAGE_SIZE), jnp.float32)
    form = tpu_softmax.Form(
        blocks=blocks,
        kv_heads=model.kv_heads,
        groups=tpu.padded_groups(model.heads // model.kv_heads, compute),
        head_dim=-(-model.head_dim // 128) * 128,
        tile=32 // item,
        page_size=shapes.PAGE_SIZE,
        scaled=item == 1,
        dtype=compute,
        sliding_window=None,
        softcap=None,
        scale=1.0,
    )
    pages = tpu.abstract_pages(
        9, shapes.PAGE_SIZE, model.kv_heads, model.head_dim, jnp.dtype(dtype)
    )
    scales = jax.ShapeDtypeStruct((9, 1, 128), jnp.float32) if item == 1 else None
    rows = tpu_refs.Rows(q=None, k=None, v=None, scales=scales)
    arrangement = tpu_many_rows.ManyRows if blocks.many_rows else tpu_softmax.FewRows
    scratch = tpu._scratch(rows, (pages[0], page), form, arrangement.scratch(form))
    buffers = [
        b for b in jax.tree.leaves(scratch) if getattr(b, "memory_space", None) == pltpu.VMEM
    ]
    assert len(buffers) >= 7
    assert sum(math.prod(b.shape) * jnp.dtype(b.dtype).itemsize for b in buffers) < 52 * 2**20


@pytest.mark.parametrize("change", [{"q_tokens": 3}, {"kv_pages": 0}, {"chunk_pages": 3}])
def test_blocks_that_cannot_be_are_refused(change):
    fields = {"q_tokens": 4, "q_tiles": 2, "kv_pages": 4, "chunk_pages": 2}
    with pytest.raises(ValueError, match="give"):
        Blocks(**{**fields, **change})
