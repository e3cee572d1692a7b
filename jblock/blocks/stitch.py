"""The stitch: hidden rows of one model to those that layers of another one read."""

from collections.abc import Mapping

import jax
from flax import nnx

from jblock.blocks.linear import Linear
from jblock.blocks.norm import Norm
from jblock.blocks.rows import Rows
from jblock.blocks.spec import StitchSpec


class Stitch(nnx.Module):
    """Joins the lower layers of one model to the upper layers of another. See StitchSpec."""

    def __init__(self, spec: StitchSpec, params: Mapping[str, jax.Array]):
        """Builds the block over tensors named as in StitchSpec, projections laid as in Linear."""
        self.spec = spec
        self.gain = nnx.Param(params["position.gain"])
        self.bias = nnx.Param(params["position.bias"])
        self.proj = Linear(params, {}, "proj")
        self.norm = Norm("rms", params, "norm.", spec.norm_eps)
        self.up = Linear(params, {}, "up")
        self.down = Linear(params, {}, "down")

    def __call__(self, x: jax.Array, positions: jax.Array, rows: Rows) -> jax.Array:
        """[T, hidden_size] float32 -> [T, output_size] float32.

        Args:
          x: rows behind the lower layers.
          positions: int32 [T], which of the spec's depths each comes from; or [], the same of all.
          rows: of the batch.
        """
        x = x * self.gain[...][positions]
        y = self.proj(x, rows) + self.bias[...][positions]
        return y + self.down(jax.nn.silu(self.up(self.norm(x), rows)), rows)
