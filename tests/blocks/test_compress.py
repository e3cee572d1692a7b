"""Differences in few bytes: what is stored says what was meant, and more bytes are never worse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.adapt import codecs
from jblock.blocks import compress
from jblock.blocks.compressed_spec import (
    BITS,
    BitDeltaSpec,
    BitsTarget,
    LowRankSpec,
    compressed_from_json,
    compressed_to_json,
)
from jblock.blocks.rope_spec import SpecError
from jblock.blocks.spec import ExpertSpec

EXPERT = ExpertSpec(hidden_size=32, intermediate_size=48)


def named(tensors):
    return {f"p.{part}": value for part, value in tensors.items()}


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    out=st.integers(1, 4),
    words=st.integers(1, 5),
    rng=st.randoms(use_true_random=False),
)
def test_packing_loses_nothing_and_lies_as_the_spec_says(bits, out, words, rng):
    inner = words * 8 // bits
    codes = np.array([[rng.randrange(2**bits) for _ in range(inner)] for _ in range(out)], np.uint8)
    packed = compress.pack(codes, bits)
    m = packed.shape[1]
    assert m == inner * bits // 8
    for o in range(out):
        for i in range(inner):
            assert (packed[o, i % m] >> (bits * (i // m))) & (2**bits - 1) == codes[o, i]
    assert compress.unpack(packed, bits).tolist() == codes.tolist()


@pytest.mark.parametrize("group", [0, 64])
def test_more_bits_are_nearer(group):
    difference = np.random.default_rng(0).standard_normal((24, 128)).astype(np.float32)
    errors = []
    for bits in BITS:
        target = BitsTarget(bits=bits, group=group)
        made, left = codecs.few_bits(difference, target)
        found = compress.few_bits_weight(named(made), "p", target)
        assert left == pytest.approx(float(np.sum((found - difference) ** 2)), rel=1e-4)
        errors.append(float(np.linalg.norm(found - difference) / np.linalg.norm(difference)))
    # Of a normal distribution 1 bit leaves sqrt(1 - 2 / pi) = 0.603, 2 evenly spaced bits 0.345.
    assert errors[0] == pytest.approx(0.60, abs=0.02)
    assert errors[1] == pytest.approx(0.34, abs=0.02)
    assert errors[2] < 0.12


def test_one_bit_is_the_sign_and_the_mean_magnitude():
    difference = np.array([[1.0, -3.0, 2.0, -2.0, 1.0, -1.0, 3.0, -3.0]], np.float32)
    target = BitsTarget(bits=1)
    made, _ = codecs.few_bits(difference, target)
    assert made["codes"].tolist() == [[0b01010101]]
    found = compress.few_bits_weight(named(made), "p", target)
    assert found.tolist() == (2.0 * np.sign(difference)).tolist()


def test_nothing_stays_next_to_nothing():
    for bits in BITS:
        target = BitsTarget(bits=bits)
        made, _ = codecs.few_bits(np.zeros((2, 8), np.float32), target)
        assert (made["scales"] > 0).all()  # slot tables tell by it that there is a delta
        assert np.abs(compress.few_bits_weight(named(made), "p", target)).max() < 1e-6


def test_low_rank_is_near_the_best_there_is():
    rng = np.random.default_rng(1)
    difference = (rng.standard_normal((40, 6)) @ rng.standard_normal((6, 32))).astype(np.float32)
    parts = codecs.decompose(difference, 32)
    size = np.linalg.norm(difference)
    for rank in (1, 3, 6):
        made = codecs.low_rank(parts, rank)
        assert {n: (v.dtype.name, v.shape) for n, v in made.items()} == {
            "a": ("int8", (rank, 32)),
            "b": ("int8", (40, rank)),
            "scale": ("float32", (rank,)),
        }
        best = np.sqrt(np.sum(parts[1][rank:] ** 2)) / size
        found = np.linalg.norm(compress.low_rank_weight(named(made), "p") - difference) / size
        assert found == pytest.approx(best, abs=0.012)


def test_the_largest_singular_values_are_found_without_the_others():
    """Of a difference whose values fall off slowly, as those of fine-tunes do."""
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((n, 200)))[0] for n in (300, 260))
    values = 1 / (1 + np.arange(200)) ** 0.5
    difference = ((u * values) @ v.T).astype(np.float32)
    parts = codecs.decompose(difference, 16)
    np.testing.assert_allclose(parts[1], values[:16], rtol=0.03)
    made = codecs.low_rank(parts, 16)
    left = codecs.low_rank_errors(difference, made, (4, 16))
    for rank, error in zip((4, 16), left, strict=True):
        found = compress.low_rank_weight(named(codecs.truncated(made, rank)), "p")
        assert error == pytest.approx(float(np.sum((found - difference) ** 2)), rel=1e-3)
        assert error == pytest.approx(float(np.sum(values[rank:] ** 2)), rel=0.02)


def test_specs_say_what_is_stored():
    low = LowRankSpec(targets={"up": 4, "down": 2})
    assert low.tensors(EXPERT)["down.b"] == (32, 2)
    bits = BitDeltaSpec(targets={"up": BitsTarget(bits=2, group=64), "down": BitsTarget(bits=1)})
    assert bits.tensors(EXPERT) == {
        "up.codes": (48, 8),
        "up.scales": (48, 1),
        "down.codes": (32, 6),
        "down.scales": (32, 1),
    }
    for spec in (low, bits):
        assert compressed_from_json(compressed_to_json(spec)) == spec
    with pytest.raises(SpecError, match="3 bits"):
        BitsTarget(bits=3)
    with pytest.raises(SpecError, match="whole numbers"):
        compressed_from_json({"kind": "low_rank", "targets": {"up": 0}})
    odd = ExpertSpec(hidden_size=12, intermediate_size=48)
    with pytest.raises(SpecError, match="12 inputs: 1 bits of each do not fill bytes"):
        BitDeltaSpec(targets={"up": BitsTarget(bits=1)}).tensors(odd)
