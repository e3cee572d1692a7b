"""The op's XLA backend against the reference, and its arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.blocks import quantize
from jblock.pallas_kernels.quantized_matmul import api, reference
from tests.pallas_kernels.quantized_cases import CASES, Case, hold, make

MULTIPLY = jax.jit(functools.partial(api.quantized_matmul, backend="xla"))


def test_there_are_enough_cases():
    assert len(set(CASES)) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    hold(case, MULTIPLY)


# Groups of an odd number of inputs share a byte.
PACKED = [*[c for c in CASES if c.bits == 4][::4], Case(3, 24, 30, 5, bits=4, zeros=True)]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_two_weights_to_a_byte(case):
    def multiply(x, w_q, *rest):
        return MULTIPLY(x, jnp.asarray(quantize.pack(np.asarray(w_q).astype(np.int8))), *rest)

    hold(case, multiply)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from([1, 4, 9]),
    out=st.sampled_from([5, 64]),
    groups=st.sampled_from([1, 3]),
    group=st.sampled_from([4, 32]),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_products(rows, out, groups, group, bits, zeros, seed):
    hold(Case(rows, out, groups * group, group, bits, zeros=zeros), MULTIPLY, seed)


def test_blocks_of_columns_and_their_rest_are_put_together(monkeypatch):
    from jblock.pallas_kernels.quantized_matmul import xla

    monkeypatch.setattr(xla, "_BLOCK_VALUES", 2**12)
    hold(Case(3, 200, 128, 32, zeros=True), lambda *a: api.quantized_matmul(*a, backend="xla"))


def test_zeros_are_where_the_weight_is_nothing():
    w = reference.dequantized([[3, 5, 7, 7]], [[2.0, 10.0]], [[3.0, 7.0]])
    np.testing.assert_array_equal(w, [[0, 4, 0, 0]])


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"w_q": jnp.zeros((256, 256), jnp.int16)},
            "w_q has dtype int16; give one of int8, int4, uint8",
        ),
        ({"x": jnp.zeros((4, 256), jnp.float16)}, "x has dtype float16"),
        ({"x": jnp.zeros((4, 128))}, "do not fit"),
        ({"scales": jnp.zeros((256, 3))}, "do not fit"),
        ({"scales": jnp.zeros((128, 2))}, "do not fit"),
        ({"zeros": jnp.zeros((256, 1))}, r"zeros \(256, 1\) are not as scales"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    good = dict(zip(("x", "w_q", "scales", "zeros"), make(Case(4, zeros=True)), strict=True))
    with pytest.raises(ValueError, match=says):
        api.quantized_matmul(**{**good, **change})


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'cuda' is not known; give one of xla"):
        api.quantized_matmul(*make(Case(4)), backend="cuda")
