"""Norms, in float32 as Hugging Face computes them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.Module):
    """Normalises the last axis of `x [..., d]`; the kinds are those of `spec.norm_tensors`.

    "rms" scales to unit mean square, then by the weight; "rms_plus_one" by 1 + weight; "layer" makes
    mean 0 and variance 1, then scales and adds a bias.
    """

    def __init__(self, kind: str, params: Mapping[str, jax.Array], name: str, eps: float):
        """Takes `name`weight, and bias, from params; `name` is "" or ends with a dot."""
        self.weight = nnx.Param(params[f"{name}weight"])
        self.bias = nnx.Param(params[f"{name}bias"]) if kind == "layer" else None
        self.kind, self.eps = kind, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] float32 -> [..., d] float32."""
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        weight = self.weight[...]
        if self.kind == "rms_plus_one":
            weight = 1.0 + weight
        y = x * jax.lax.rsqrt(variance + self.eps) * weight
        return y if self.bias is None else y + self.bias[...]
