"""Rotary position embedding (arXiv 2104.09864) and the ways models stretch it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.rope_spec import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> np.ndarray:
    """float32 [rotated // 2], radians per position of each rotated pair."""
    dim = spec.rotated(head_dim)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freqs = (1.0 / np.power(np.float32(spec.theta), exponents)).astype(np.float32)
    if spec.kind == "linear":
        freqs = freqs / np.float32(spec.factor)
    elif spec.kind == "llama3":
        freqs = _llama3(spec, freqs)
    elif spec.kind == "yarn":
        freqs = _yarn(spec, freqs, dim)
    elif spec.kind == "longrope":
        freqs = freqs / np.asarray(spec.factors, np.float32)
    return freqs.astype(np.float32)


def _llama3(spec: RopeSpec, freqs: np.ndarray) -> np.ndarray:
    """Stretches long wavelengths by `factor`, leaves short ones, and blends between (the scheme
    released with Llama 3.1)."""
    wavelengths = 2 * math.pi / freqs
    longest_kept = spec.original_max_position / spec.high_freq_factor
    shortest_stretched = spec.original_max_position / spec.low_freq_factor
    blend = (spec.original_max_position / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * freqs / spec.factor + blend * freqs
    return np.where(
        wavelengths > shortest_stretched,
        freqs / spec.factor,
        np.where(wavelengths < longest_kept, freqs, blended),
    )


def _yarn(spec: RopeSpec, freqs: np.ndarray, dim: int) -> np.ndarray:
    """Leaves pairs that turn often within the first context, stretches those that hardly turn, and
    goes from one to the other linearly in the pair's index (arXiv 2309.00071, section 3.2)."""

    def index(turns: float) -> float:
        """Of the pair that turns so often within the first context."""
        ratio = spec.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(spec.theta))

    first, last = index(spec.beta_fast), index(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0.0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
    return freqs / spec.factor * ramp + freqs * (1 - ramp)


def turns(
    positions: jax.Array, inv_freq: np.ndarray, scale: float = 1.0, *, materialized: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, times `scale`, of each position's angles: float32 [..., pairs] both.

    Args:
      positions: int32 [...].
      inv_freq: as `inverse_frequencies` gives them.
      scale: of the rotated dimensions.
      materialized: computed once. Left to itself, XLA for CPU computes them anew for every head, which
        takes five times as long as rotating. It fuses them through barriers; a sum of two halves, which
        is exact, it does not fuse.
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq)
    both = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    if materialized:
        both = jnp.sum(jnp.stack([0.5 * both, 0.5 * both]), axis=0)
    cos, sin = both[0], both[1]
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotates the leading 2 * pairs dimensions of `x [..., heads, head_dim]` by `turns` of its positions
    ([..., pairs]); their first half pairs with their second half, or if interleaved each even dimension
    with the odd one behind it."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    dim = 2 * cos.shape[-1]
    if interleaved:
        first, second = x[..., 0:dim:2], x[..., 1:dim:2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        rotated = pairs.reshape(*x.shape[:-1], dim)
        return jnp.concatenate([rotated, x[..., dim:]], axis=-1) if dim < x.shape[-1] else rotated
    first, second = jnp.split(x[..., :dim], 2, axis=-1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*halves, x[..., dim:]] if dim < x.shape[-1] else halves, axis=-1)
