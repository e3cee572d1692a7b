"""How much paged attention on TPU moves and computes, against what must be; and that the count is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jblock.pallas_kernels.paged_attention import shapes
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from tests.pallas_kernels.traffic import Traffic, count

LLAMA, QWEN, GEMMA = shapes.MODELS[0], shapes.MODELS[2], shapes.MODELS[4]
RNG = np.random.default_rng(0)
DECODE = {
    # Lengths of 64 streams, 512 to 4096 tokens, and all at 4096.
    "ragged": tuple((int(n), 1) for n in RNG.integers(512, 4096, 64)),
    "4096": ((4095, 1),) * 64,
    "short": tuple((int(n), 1) for n in RNG.integers(128, 512, 64)),
}
PREFILL = {
    "2048 new": ((0, 2048),),
    "ragged": ((0, 1500), (4000, 2000), (1024, 1024), (0, 700)),
    "chunk at 6144": ((6144, 2048),),
    "few at 6144": ((6144, 256),),
}


def traffic(model: shapes.Model, sequences, dtype: str) -> Traffic:
    """The kernel's work on a batch, rows packed."""
    new = np.array([n for _, n in sequences], np.int32)
    kv_lens = np.array([c + n for c, n in sequences], np.int32)
    max_pages = -(-int(kv_lens.max()) // shapes.PAGE_SIZE)
    batch = shapes.Batch(
        name="",
        num_seqs=len(new),
        rows=int(new.sum()),
        max_q_len=int(new.max()),
        max_len=max_pages * shapes.PAGE_SIZE,
    )
    fn, (q, k, v, pages, _) = shapes.program("tpu", model, batch, dtype, device_kind="none")
    ragged = Ragged(
        row_starts=(np.cumsum(new) - new).astype(np.int32),
        q_lens=new,
        kv_lens=kv_lens,
        page_table=1 + np.arange(len(new) * max_pages, dtype=np.int32).reshape(len(new), -1),
        max_q_len=batch.max_q_len,
    )
    return count(fn, q, k, v, pages, ragged)


def later(*args):
    """A shape that takes its time: counted by `make test-long`."""
    return pytest.param(*args, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "model, name, dtype",
    [
        (LLAMA, "ragged", "bfloat16"),
        later(QWEN, "ragged", "int8"),
        (GEMMA, "ragged", "bfloat16"),
        later(LLAMA, "ragged", "int8"),
        later(LLAMA, "ragged", "float8_e4m3fn"),
        later(LLAMA, "4096", "bfloat16"),
        (LLAMA, "short", "bfloat16"),
    ],
)
def test_decoding_moves_little_more_than_it_must(model, name, dtype):
    got = traffic(model, DECODE[name], dtype)
    must, _ = shapes.needed(model, DECODE[name], dtype)
    assert must <= got.hbm_bytes + got.staged <= 1.15 * must
    assert got.grid_steps == 1  # the kernel finds its own way


@pytest.mark.parametrize(
    "model, name",
    [
        (LLAMA, "2048 new"),
        (GEMMA, "few at 6144"),
        later(LLAMA, "ragged"),
        later(LLAMA, "chunk at 6144"),
        later(QWEN, "ragged"),
        later(GEMMA, "chunk at 6144"),
    ],
)
def test_prefill_computes_little_more_than_it_must(model, name):
    got = traffic(model, PREFILL[name], "bfloat16")
    _, must = shapes.needed(model, PREFILL[name], "bfloat16")
    # A window's edge and the diagonal cost half a strip of 128 keys each, sums of weights a sixteenth.
    assert must <= got.flops <= (1.15 if model.window is None else 1.2) * must
    assert got.outside_flops == 0


def test_pages_outside_length_and_window_cost_nothing():
    short = traffic(LLAMA, ((100, 1),) * 4, "bfloat16")
    empty = traffic(LLAMA, ((100, 1),) * 4 + ((4000, 0),) * 4, "bfloat16")
    assert empty.hbm_bytes == short.hbm_bytes and empty.flops == short.flops
    near = traffic(GEMMA, ((2047, 1),), "bfloat16")
    far = traffic(GEMMA, ((8191, 1),), "bfloat16")
    assert far.hbm_bytes == near.hbm_bytes


def test_the_count_is_right_on_a_matmul():
    """A pipeline of BlockSpecs, by hand: x blocks are fetched once a row, y blocks at every step."""

    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    @functools.partial(jax.jit)
    def matmul(x, y):
        return pl.pallas_call(
            kernel,
            grid=(4, 2),
            in_specs=[
                pl.BlockSpec((128, 256), lambda i, j: (i, 0)),
                pl.BlockSpec((256, 128), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((512, 256), jnp.float32),
        )(x, y)

    got = count(
        matmul,
        jax.ShapeDtypeStruct((512, 256), jnp.float32),
        jax.ShapeDtypeStruct((256, 256), jnp.float32),
    )
    assert got.flops == 2 * 512 * 256 * 256
    assert got.grid_steps == 8
    assert got.copied["hbm", "vmem"] == 4 * (4 * 128 * 256 + 8 * 256 * 128)
    assert got.copied["vmem", "hbm"] == 4 * 512 * 256


def test_a_branch_on_numbers_left_out_is_refused():
    def kernel(x, out):
        @pl.when(x[0, 0] > 0)
        def _():
            out[...] = x[...]

    def call(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(ValueError, match="depends on numbers that are left out"):
        count(call, jax.ShapeDtypeStruct((8, 128), jnp.float32))
