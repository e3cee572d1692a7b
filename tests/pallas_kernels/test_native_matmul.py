"""The CPU's own bfloat16 product against numpy, and that a row's bits are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jblock.blocks.linear import matmul
from jblock.blocks.platform import here
from jblock.pallas_kernels.native import matmul as native
from jblock.pallas_kernels.native import targets

pytestmark = pytest.mark.skipif(
    not (targets.available() and targets.has_amx()), reason="this CPU has no AMX tiles to test with"
)


def arrays(count, out, width):
    rng = np.random.default_rng(count * out)
    x = rng.standard_normal((count, width)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((out, width)), jnp.bfloat16)
    return x, weight


@pytest.mark.parametrize("count", [1, 3, 16, 17, 33, 64])
@pytest.mark.parametrize(("out", "width"), [(32, 32), (96, 160), (1024, 96), (64, 2816)])
def test_multiplies(count, out, width):
    x, weight = arrays(count, out, width)
    assert native.serves(count, weight)
    got = jax.jit(native.matmul)(x, weight)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    wanted = rounded @ np.asarray(weight, np.float32).T
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_rows_bits_are_its_own():
    x, weight = arrays(64, 256, 512)
    together = np.asarray(jax.jit(native.matmul)(x, weight))
    for rows in (slice(0, 1), slice(5, 12), slice(20, 53)):
        np.testing.assert_array_equal(jax.jit(native.matmul)(x[rows], weight), together[rows])


def test_poison_stays_in_its_row():
    x, weight = arrays(8, 64, 64)
    clean = np.asarray(jax.jit(native.matmul)(x, weight))
    x[3] = np.nan
    got = np.asarray(jax.jit(native.matmul)(x, weight))
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, axis=0), np.delete(clean, 3, axis=0))


@pytest.mark.parametrize(("out", "width"), [(48, 64), (64, 40)])
def test_other_shapes_are_left_to_xla(out, width):
    x, weight = arrays(4, out, width)
    assert not native.serves(4, weight)
    got = jax.jit(lambda x, w: matmul(x, w, here()))(x, weight)
    wanted = x @ np.asarray(weight, np.float32).T
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())
