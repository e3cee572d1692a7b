"""Differences of weights to few bytes and back, in numpy."""

from collections.abc import Mapping

import numpy as np

from jblock.blocks.compressed_spec import BitDeltaSpec, BitsTarget, LowRankSpec

Tensors = Mapping[str, np.ndarray]
# Shares of the largest magnitude that the outermost level may stand for; the best of a group is taken.
_REACHES = np.linspace(0.3, 1.0, 15, dtype=np.float32)


def low_rank(parts: tuple[np.ndarray, np.ndarray, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The best approximation of a rank, both factors in 8 bits with one scale a singular value.

    Args:
      parts: u [out, n], s [n], v [n, in] of the difference (`decompose`).
      rank: of the result, at most n.

    Returns:
      `a`, `b` and `scale` as LowRankSpec describes them.
    """
    u, s, v = (x[:, :rank] if i == 0 else x[:rank] for i, x in enumerate(parts))
    tops = [np.maximum(np.abs(m).max(axis=i), np.float32(1e-20)) for i, m in enumerate((u, v))]
    b = np.round(u / tops[0] * 127).astype(np.int8)
    a = np.round(v / tops[1][:, None] * 127).astype(np.int8)
    scale = (s * tops[0] * tops[1] / 127**2).astype(np.float32)
    return {"a": a, "b": b, "scale": scale}


def decompose(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of a float32 matrix."""
    u, s, v = np.linalg.svd(difference.astype(np.float32, copy=False), full_matrices=False)
    return u, s, v


def low_rank_weight(tensors: Tensors, projection: str) -> np.ndarray:
    """The float32 difference [out, in] that a low-rank delta stands for."""
    a, b = low_rank_factors(tensors, projection)
    return b @ a


def low_rank_factors(tensors: Tensors, projection: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 a [rank, in] and b [out, rank], the scale in b, as LoRA has them."""
    a, b = (tensors[f"{projection}.{x}"].astype(np.float32) for x in ("a", "b"))
    return a, b * tensors[f"{projection}.scale"]


def few_bits(difference: np.ndarray, target: BitsTarget) -> dict[str, np.ndarray]:
    """Codes and scales of a difference; each group has the scale of the smallest squared error, among
    some for more bits, exactly (twice the mean magnitude) for one.

    Args:
      difference: float32 [out, in].
      target: bits and group.

    Returns:
      `codes` and `scales` as BitDeltaSpec describes them.
    """
    out, inner = difference.shape
    groups = difference.reshape(out, -1, target.group_of(inner))
    magnitude = np.abs(groups)
    if target.bits == 1:
        tries = [2 * magnitude.mean(axis=-1)]
    else:
        tries = [r * magnitude.max(axis=-1) / 2 ** (target.bits - 1) for r in _REACHES]
    best: np.ndarray | None = None
    for scales in tries:
        # Of 0 no code could be worked out; the least positive number rounds to nothing in a sum.
        scales = np.maximum(scales, np.float32(6e-8)).astype(np.float16)
        codes = _codes(groups, scales, target.bits)
        error = np.sum((_values(codes, scales, target.bits) - groups) ** 2, axis=-1)
        if best is None:
            best, chosen, chosen_codes = error, scales, codes
        else:
            better = error < best
            best = np.where(better, error, best)
            chosen = np.where(better, scales, chosen)
            chosen_codes = np.where(better[..., None], codes, chosen_codes)
    return {"codes": pack(chosen_codes.reshape(out, inner), target.bits), "scales": chosen}


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


def _codes(groups: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    below = np.floor(groups / scales.astype(np.float32)[..., None])
    half = 2 ** (bits - 1)
    return (np.clip(below, -half, half - 1) + half).astype(np.uint8)


def _values(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    middle = np.float32((2**bits - 1) / 2)
    return (codes.astype(np.float32) - middle) * scales.astype(np.float32)[..., None]
