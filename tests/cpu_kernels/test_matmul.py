"""The CPU's own products against numpy, and that a row's bits are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jblock.blocks.linear import matmul
from jblock.blocks.platform import here
from jblock.cpu_kernels import targets
from jblock.cpu_kernels.matmul import api as products

BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(
        not (targets.available() and (targets.has_amx() or targets.has_avx512_bf16())),
        reason="this CPU has neither AMX nor AVX-512 BF16",
    ),
)
FLOAT32 = pytest.param(
    "float32",
    marks=pytest.mark.skipif(
        not (targets.available() and targets.has_avx512()), reason="this CPU has no AVX-512"
    ),
)
DTYPES = [BFLOAT16, FLOAT32]


def arrays(count, out, width, dtype="bfloat16"):
    rng = np.random.default_rng(count * out)
    x = rng.standard_normal((count, width)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((out, width)), dtype)
    return x, weight


def alone(x, weight):
    return products.matmul(x, [weight])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 11, 16, 17, 24, 25, 50, 64])
@pytest.mark.parametrize(("out", "width"), [(32, 32), (96, 160), (64, 2816)])
def test_multiplies(count, out, width, dtype):
    x, weight = arrays(count, out, width, dtype)
    if not products.serves(count, [weight]):
        assert dtype == "float32" and (count == 1 or count > 24)
        return
    got = jax.jit(alone)(x, weight)
    rounded = np.asarray(jnp.asarray(x, dtype), np.float64)
    wanted = rounded @ np.asarray(weight, np.float64).T
    close = 5e-6 if dtype == "float32" else 1e-5
    np.testing.assert_allclose(got, wanted, rtol=0, atol=close * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 24])
def test_several_weights_at_once(count, dtype):
    x, _ = arrays(count, 32, 512)
    weights = [arrays(1, out, 512, dtype)[1] for out in (1024, 32, 320)]
    together = jax.jit(lambda x, *w: products.matmul(x, w))(x, *weights)
    for got, weight in zip(together, weights, strict=True):
        np.testing.assert_array_equal(got, jax.jit(alone)(x, weight))


@pytest.mark.parametrize(
    ("dtype", "of", "parts"),
    [
        pytest.param(
            *("bfloat16", 64, (slice(0, 1), slice(5, 12), slice(20, 53))), marks=BFLOAT16.marks
        ),
        pytest.param(
            *("float32", 24, (slice(0, 2), slice(5, 8), slice(3, 23))), marks=FLOAT32.marks
        ),
    ],
)
def test_a_rows_bits_are_its_own(dtype, of, parts):
    x, weight = arrays(of, 256, 512, dtype)
    together = np.asarray(jax.jit(alone)(x, weight))
    for rows in parts:
        np.testing.assert_array_equal(jax.jit(alone)(x[rows], weight), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [8, 20])
def test_poison_stays_in_its_row(count, dtype):
    x, weight = arrays(count, 64, 64, dtype)
    clean = np.asarray(jax.jit(alone)(x, weight))
    x[3] = np.nan
    got = np.asarray(jax.jit(alone)(x, weight))
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, axis=0), np.delete(clean, 3, axis=0))


@pytest.mark.parametrize(("out", "width"), [(48, 64), (64, 40)])
def test_other_shapes_are_left_to_xla(out, width):
    x, weight = arrays(4, out, width)
    assert not products.serves(4, [weight])
    got = jax.jit(lambda x, w: matmul(x, w, here(), transposed=True))(x, weight)
    wanted = x @ np.asarray(weight, np.float32).T
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_large_for_a_threads_stack_are_left_to_xla(dtype):
    assert not products.serves(20, [jax.ShapeDtypeStruct((64, 16384), dtype)])
    assert products.serves(16, [jax.ShapeDtypeStruct((64, 16384), dtype)])


def test_a_cpu_without_the_instructions_is_served_by_xla(monkeypatch):
    monkeypatch.setattr(targets, "has_amx", lambda: False)
    monkeypatch.setattr(targets, "has_avx512", lambda: False)
    monkeypatch.setattr(targets, "has_avx512_bf16", lambda: False)
    assert not products.serves(4, [jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)])
    assert not products.serves(4, [jax.ShapeDtypeStruct((64, 64), jnp.float32)])
    with pytest.raises(
        RuntimeError, match="bfloat16 weights in this process: the CPU has no AMX or AVX-512 BF16"
    ):
        targets.target("matmul", "bfloat16", 4)
