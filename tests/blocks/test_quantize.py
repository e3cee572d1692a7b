"""Rounding weights: the numbers are qwix's, and what is stored says what was meant."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.blocks import quantize
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import SpecError

GOLDEN = Path(__file__).parent.parent / "fixtures" / "quant" / "qwix.npz"


@pytest.mark.parametrize("name", ["int4_16", "int4_48", "int8_8"])
def test_as_qwix_does_it(name):
    with np.load(GOLDEN) as arrays:
        golden = dict(arrays)
    bits, group = int(name[3]), int(name.rpartition("_")[2])
    spec = QuantSpec(bits=bits, group=group)
    made = quantize.quantize(golden["weight"], spec)
    codes = quantize.unpack(made["codes"]) if bits == 4 else made["codes"]
    # qwix divides in XLA, which may differ in the last bit; that decides between two codes only for a
    # weight half way between them, as the largest of each group is by construction.
    np.testing.assert_allclose(made["scales"], golden[f"{name}.scales"], rtol=2e-7)
    step = np.repeat(golden[f"{name}.scales"], group, axis=1)
    tie = np.abs(np.abs(golden["weight"] / step) % 1 - 0.5) < 1e-4
    same = codes.astype(np.int8) == golden[f"{name}.codes"]
    assert (same | tie).all() and same.mean() > 0.85
    stored = {f"p.{part}": value for part, value in made.items()}
    wide = quantize.dequantize(stored, "p", spec)
    np.testing.assert_allclose(wide[same], golden[f"{name}.weight"][same], rtol=3e-7)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.integers(1, 40),
    out=st.integers(1, 5),
    inner=st.integers(1, 24).map(lambda n: 2 * n),
    seed=st.integers(0, 9),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
def test_no_weight_is_further_off_than_half_a_step(bits, group, out, inner, seed, size):
    weight = np.random.default_rng(seed).standard_normal((out, inner)).astype(np.float32) * size
    weight = weight.astype(np.float32)
    spec = QuantSpec(bits=bits, group=group)
    made = {f"p.{part}": value for part, value in quantize.quantize(weight, spec).items()}
    shapes = spec.tensors("p", out, inner)
    assert {n: v.shape for n, v in made.items()} == shapes
    assert all(v.dtype == spec.dtype(n) for n, v in made.items())
    wide = quantize.dequantize(made, "p", spec)
    step = np.repeat(made["p.scales"], spec.group_of(inner), axis=1)
    # Weights this small are all 0, in steps of 1.
    assert (np.abs(wide - weight) <= step * 0.5001).all()


@given(st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_packing_loses_nothing(out, half, rng):
    codes = np.array([[rng.randint(-8, 7) for _ in range(2 * half)] for _ in range(out)], np.int8)
    packed = quantize.pack(codes)
    assert packed.nbytes * 2 == codes.nbytes
    assert quantize.unpack(packed).astype(np.int8).tolist() == codes.tolist()


def test_zeros_and_order():
    spec = QuantSpec(bits=8, group=2, zeros=True, ordered=True)
    tensors = {
        "p.codes": np.array([[1, 2, 3, 4]], np.int8),
        "p.scales": np.array([[0.5, 2.0]], np.float32),
        "p.zeros": np.array([[1, -1]], np.int8),
        "p.order": np.array([2, 0, 3, 1], np.int32),
    }
    assert {n: v.shape for n, v in tensors.items()} == spec.tensors("p", 1, 4)
    assert quantize.dequantize(tensors, "p", spec).tolist() == [[0.5, 10.0, 0.0, 8.0]]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"bits": 3, "group": 8}, "bits is 3; give one of 4, 8"),
        ({"bits": 4, "group": 0}, "group is 0"),
    ],
)
def test_what_is_no_quantization(fields, said):
    with pytest.raises(SpecError, match=said):
        QuantSpec(**fields)
    with pytest.raises(SpecError, match="5 inputs; 4 bits need an even number"):
        QuantSpec(bits=4, group=8).tensors("p", 2, 5)
