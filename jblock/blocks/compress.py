"""Differences of weights back from few bytes, in numpy. `jblock.adapt.codecs` makes them."""

from collections.abc import Mapping

import numpy as np

from jblock.blocks.compressed_spec import BitDeltaSpec, BitsTarget, LowRankSpec

Tensors = Mapping[str, np.ndarray]


def low_rank_weight(tensors: Tensors, projection: str) -> np.ndarray:
    """The float32 difference [out, in] that a low-rank delta stands for."""
    a, b = low_rank_factors(tensors, projection)
    return b @ a


def low_rank_factors(tensors: Tensors, projection: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 a [rank, in] and b [out, rank], the scale in b, as LoRA has them."""
    a, b = (tensors[f"{projection}.{x}"].astype(np.float32) for x in ("a", "b"))
    return a, b * tensors[f"{projection}.scale"]


def few_bits_weight(tensors: Tensors, projection: str, target: BitsTarget) -> np.ndarray:
    """The float32 difference [out, in] that a delta of few bits stands for."""
    scales = tensors[f"{projection}.scales"]
    codes = unpack(tensors[f"{projection}.codes"], target.bits)
    return _values(codes.reshape(*scales.shape, -1), scales, target.bits).reshape(codes.shape)


def difference_of(
    spec: LowRankSpec | BitDeltaSpec, tensors: Tensors, projection: str
) -> np.ndarray:
    """The float32 difference [out, in] that a delta stands for on one of its projections."""
    if isinstance(spec, LowRankSpec):
        return low_rank_weight(tensors, projection)
    return few_bits_weight(tensors, projection, spec.targets[projection])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [out, in] of codes -> [out, in * bits / 8], laid out as BitDeltaSpec says."""
    planes = np.split(codes, 8 // bits, axis=1)
    packed = np.zeros_like(planes[0])
    for k, plane in enumerate(planes):
        packed |= plane << (bits * k)
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `pack`."""
    mask = 2**bits - 1
    return np.concatenate([(packed >> (bits * k)) & mask for k in range(8 // bits)], axis=1)


def _values(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    middle = np.float32((2**bits - 1) / 2)
    return (codes.astype(np.float32) - middle) * scales.astype(np.float32)[..., None]
