"""Differences of weights to few bytes, on whatever device jax computes on. `blocks.compress` reads them back.

The singular values are found by a randomized range finder with power iterations (Halko, Martinsson and Tropp
2011, algorithm 4.4), which costs some products with a narrow matrix instead of a full decomposition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks import compress
from jblock.blocks.compressed_spec import BitsTarget

_EXACT = jax.lax.Precision.HIGHEST
_SPARE = 16  # columns beyond the wanted rank
_POWERS = 3
# Shares of the largest magnitude that the outermost level may stand for; the best of a group is taken.
_REACHES = np.linspace(0.3, 1.0, 15, dtype=np.float32)


def decompose(
    difference: np.ndarray, rank: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values of a float32 matrix [out, in], and their vectors.

    Returns:
      u [out, n], s [n], v [n, in]; n is `rank`, or less where the matrix has no more.
    """
    x = jnp.asarray(difference, jnp.float32)
    if min(x.shape) <= rank + _SPARE:
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
    else:
        u, s, v = _largest(rank + _SPARE, x, jax.random.key(seed))
    return np.asarray(u[:, :rank]), np.asarray(s[:rank]), np.asarray(v[:rank])


@functools.partial(jax.jit, static_argnums=0)
def _largest(count: int, x, key):
    def product(a, b):
        return jnp.matmul(a, b, precision=_EXACT)

    basis, _ = jnp.linalg.qr(product(x, jax.random.normal(key, (x.shape[1], count))))
    for _ in range(_POWERS):
        other, _ = jnp.linalg.qr(product(x.T, basis))
        basis, _ = jnp.linalg.qr(product(x, other))
    u, s, v = jnp.linalg.svd(product(basis.T, x), full_matrices=False)
    return product(basis, u), s, v


def low_rank(parts: tuple[np.ndarray, np.ndarray, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The approximation of a rank, both factors in 8 bits with one scale a singular value. That of a smaller
    rank is its first columns (`truncated`).

    Args:
      parts: of the difference, from `decompose`.
      rank: of the result, at most as many as there are.

    Returns:
      `a`, `b` and `scale` as LowRankSpec describes them.
    """
    u, s, v = (x[:, :rank] if i == 0 else x[:rank] for i, x in enumerate(parts))
    tops = [np.maximum(np.abs(m).max(axis=i), np.float32(1e-20)) for i, m in enumerate((u, v))]
    b = np.round(u / tops[0] * 127).astype(np.int8)
    a = np.round(v / tops[1][:, None] * 127).astype(np.int8)
    scale = (s * tops[0] * tops[1] / 127**2).astype(np.float32)
    return {"a": a, "b": b, "scale": scale}


def truncated(made: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """`low_rank` of a smaller rank."""
    return {
        "a": np.ascontiguousarray(made["a"][:rank]),
        "b": np.ascontiguousarray(made["b"][:, :rank]),
        "scale": made["scale"][:rank],
    }


def low_rank_errors(
    difference: np.ndarray, made: dict[str, np.ndarray], ranks: tuple[int, ...]
) -> list[float]:
    """Squared error that each of some ascending ranks of a `low_rank` leaves."""
    b = jnp.asarray(made["b"].astype(np.float32) * made["scale"])
    a = jnp.asarray(made["a"].astype(np.float32))
    rest, before, found = jnp.asarray(difference, jnp.float32), 0, []
    for rank in ranks:
        rest = _without(rest, b[:, before:rank], a[before:rank])
        found.append(float(jnp.sum(rest * rest)))
        before = rank
    return found


@jax.jit
def _without(rest, b, a):
    return rest - jnp.matmul(b, a, precision=_EXACT)


def few_bits(difference: np.ndarray, target: BitsTarget) -> tuple[dict[str, np.ndarray], float]:
    """Codes and scales of a difference; each group has the scale of the smallest squared error, among
    some for more bits, exactly (twice the mean magnitude) for one.

    Args:
      difference: float32 [out, in].
      target: bits and group.

    Returns:
      `codes` and `scales` as BitDeltaSpec describes them, and the squared error that they leave.
    """
    out, inner = difference.shape
    groups = jnp.asarray(difference, jnp.float32).reshape(out, -1, target.group_of(inner))
    codes, scales, error = _few_bits(target.bits, groups)
    packed = compress.pack(np.asarray(codes).reshape(out, inner), target.bits)
    return {"codes": packed, "scales": np.asarray(scales)}, float(error)


@functools.partial(jax.jit, static_argnums=0)
def _few_bits(bits: int, groups):
    half, middle = 2 ** (bits - 1), (2**bits - 1) / 2
    magnitude = jnp.abs(groups)

    def coded(scales):
        # Of 0 no code could be worked out; the least positive number rounds to nothing in a sum.
        scales = jnp.maximum(scales, 6e-8).astype(jnp.float16)
        wide = scales.astype(jnp.float32)[..., None]
        codes = jnp.clip(jnp.floor(groups / wide), -half, half - 1) + half
        error = jnp.sum(((codes - middle) * wide - groups) ** 2, axis=-1)
        return codes.astype(jnp.uint8), scales, error

    if bits == 1:
        codes, scales, error = coded(2 * magnitude.mean(axis=-1))
        return codes, scales, jnp.sum(error)
    top = magnitude.max(axis=-1)

    def better(best, reach):
        _, scales, error = coded(reach * top / half)
        less = error < best[1]
        return (jnp.where(less, scales, best[0]), jnp.where(less, error, best[1])), None

    none = (jnp.zeros(top.shape, jnp.float16), jnp.full(top.shape, jnp.inf))
    (scales, _), _ = jax.lax.scan(better, none, jnp.asarray(_REACHES))
    codes, scales, error = coded(scales.astype(jnp.float32))
    return codes, scales, jnp.sum(error)
