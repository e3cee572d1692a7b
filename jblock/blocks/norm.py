"""RMSNorm (arXiv 1910.07467), in float32 as Hugging Face Llama computes it."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """Scales `x [..., d]` to unit mean square, then by `weight [d]`."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] float32 -> [..., d] float32."""
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.eps) * self.weight[...]
