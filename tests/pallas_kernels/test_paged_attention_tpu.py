"""The TPU kernel in jax's TPU interpreter (`tpu_interpreter`).

`make test` takes one case of each pair of dtypes and as many more as meet every form and feature;
`make test-long` takes all, rounded to sizes that many share: with small blocks and with the heuristic's.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention import shapes, tpu, tpu_blocks
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.tpu_blocks import Blocks, Shape
from tests.pallas_kernels.attention_cases import CASES, FORMS, Case, check, run
from tests.pallas_kernels.tpu_interpreter import FAST, INTERPRET, RACE, bound_mappings

SPREAD = list(dict.fromkeys([*CASES[22::24], *{(c.kv, c.q): c for c in CASES}.values()]))


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
    """Blocks so small that a case of a few tokens takes several items, blocks and chunks."""
    q_tokens = 1 if case.max_q_len == 1 else 4
    return Blocks(q_tokens=q_tokens, q_tiles=2, kv_pages=4, chunk_pages=2)


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
    assert {(c.kv, c.q) for c in SPREAD} == {(c.kv, c.q) for c in CASES}
    assert {c.form for c in SPREAD} == set(FORMS)
    for feature in ("window", "softcap", "scale"):
        assert any(getattr(c, feature) is not None for c in SPREAD)


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_matches_reference(case, capfd):
    hold(case, small(case), capfd)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cut", ["small", "heuristic"])
def test_every_case_matches_reference(case, cut, capfd):
    hold(case, small(case) if cut == "small" else None, capfd, rounded=True)


def test_a_batch_without_tokens_has_an_item_of_one():
    zeros = jnp.zeros(3, jnp.int32)
    lens = jnp.array([9, 0, 16], jnp.int32)
    table = jnp.arange(6, dtype=jnp.int32).reshape(3, 2)
    ragged = Ragged(row_starts=zeros, q_lens=zeros, kv_lens=lens, page_table=table, max_q_len=4)
    blocks = Blocks(q_tokens=4, q_tiles=2, kv_pages=4, chunk_pages=2)
    plan = tpu._plan(ragged, 12, blocks, 8, 8, scaled=True)
    seq, tile, tiles, first, end = (int(a[0]) for a in plan.items)
    assert (plan.num_items, plan.tiles.count, plan.scales.count) == (1, 0, 0)
    assert (tile, tiles, first, end) == (0, 1, 0, 1) and seq in range(3)


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


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=3, max_size=3)


def random_case(sequences, form, window, kv):
    # The last sequence fixes max_q_len and the size of the page table, and so the program.
    return Case((*sequences, (41, 9)), form, window=window, kv=kv)


@settings(max_examples=2, deadline=None)
@given(sequences=LENGTHS, seed=st.integers(0, 99))
def test_matches_reference_on_random_batches(sequences, seed):
    case = random_case(sequences, "packed", 12, "float32")
    put(case, small(case), seed)


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
    pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=INTERPRET,
    )(x).block_until_ready()
    assert RACE in "".join(capfd.readouterr())


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
    b = tpu_blocks.heuristic(shape)
    item = jnp.dtype(dtype).itemsize
    kv = 4 * model.kv_heads * b.kv_pages * shapes.PAGE_SIZE * model.head_dim * item
    rows = b.q_tiles * model.heads * max(b.q_tokens, 16)
    state = rows * (2 * 128 + model.head_dim) * 4 + 4 * rows * model.head_dim * 4
    assert kv + state < 48 * 2**20


@pytest.mark.parametrize("change", [{"q_tokens": 3}, {"kv_pages": 0}, {"chunk_pages": 3}])
def test_blocks_that_cannot_be_are_refused(change):
    fields = {"q_tokens": 4, "q_tiles": 2, "kv_pages": 4, "chunk_pages": 2}
    with pytest.raises(ValueError, match="give"):
        Blocks(**{**fields, **change})
