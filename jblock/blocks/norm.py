"""Norms, in float32 as Hugging Face computes them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots


class Norm(nnx.Module):
    """Normalizes the last axis of `x [..., d]`; the kinds are those of `spec.norm_tensors`.

    "rms" scales to unit mean square, then by the weight; "rms_plus_one" by 1 + weight; "layer" makes
    mean 0 and variance 1, then scales and adds a bias; "layer_no_bias" adds none.
    """

    def __init__(
        self,
        kind: str,
        params: Mapping[str, jax.Array],
        name: str,
        eps: float,
        slots: Slots | None = None,
    ):
        """Takes `name`weight, and bias, from params; `name` is "" or ends with a dot.

        Args:
          kind: as above.
          params: tensors of the component.
          name: of the norm.
          eps: added to the variance.
          slots: the component's slot tables, where rows may have a weight and bias of their own.
        """
        self.weight = nnx.Param(params[f"{name}weight"])
        self.bias = nnx.Param(params[f"{name}bias"]) if kind == "layer" else None
        self.kind, self.name, self.eps, self.slots = kind, name, eps, slots or Slots()

    def __call__(self, x: jax.Array, rows: Rows | None = None) -> jax.Array:
        """[T, d] or [S, Q, heads, d], float32, -> the same; rows may be left out without slot tables."""
        if self.kind.startswith("layer"):
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        weight = self._own("weight", self.weight[...], x, rows)
        if self.kind == "rms_plus_one":
            weight = 1.0 + weight
        y = x * jax.lax.rsqrt(variance + self.eps) * weight
        return y if self.bias is None else y + self._own("bias", self.bias[...], x, rows)

    def _own(self, tensor: str, base: jax.Array, x: jax.Array, rows: Rows | None) -> jax.Array:
        vector = self.slots.own(f"{self.name}{tensor}", base, rows)
        if vector is None or vector.ndim == 1 or x.ndim == 2:
            return base if vector is None else vector
        return vector.reshape(*x.shape[:2], 1, x.shape[-1])
