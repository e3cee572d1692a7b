"""Rotary position embedding (arXiv 2104.09864) and the ways models stretch it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.spec import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> np.ndarray:
    """float32 [head_dim // 2], radians per position of each rotated pair.

    "llama3" stretches long wavelengths by `factor`, leaves short ones, and blends between (the
    scheme released with Llama 3.1).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.power(np.float32(spec.theta), exponents)).astype(np.float32)
    if spec.kind == "default":
        return freqs
    wavelengths = 2 * math.pi / freqs
    longest_kept = spec.original_max_position / spec.high_freq_factor
    shortest_stretched = spec.original_max_position / spec.low_freq_factor
    blend = (spec.original_max_position / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * freqs / spec.factor + blend * freqs
    freqs = np.where(
        wavelengths > shortest_stretched,
        freqs / spec.factor,
        np.where(wavelengths < longest_kept, freqs, blended),
    )
    return freqs.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, inv_freq: np.ndarray) -> jax.Array:
    """Rotates `x [..., heads, head_dim]` by `positions [...]`; first half pairs with second half."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
