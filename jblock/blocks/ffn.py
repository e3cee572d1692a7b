"""The gated feed-forward block with its residual."""

from collections.abc import Mapping

import jax
from flax import nnx

from jblock.blocks.linear import Linear
from jblock.blocks.norm import RMSNorm
from jblock.blocks.rows import Rows
from jblock.blocks.spec import FfnSpec

_ACTIVATIONS = {"silu": jax.nn.silu}


class Ffn(nnx.Module):
    """`x + down(act(gate(norm(x))) * up(norm(x)))` (SwiGLU, arXiv 2002.05202).

    gate and up stay two projections: on CPU a fused one with a split measured slower.
    """

    def __init__(
        self, spec: FfnSpec, params: Mapping[str, jax.Array], deltas: Mapping[str, jax.Array]
    ):
        """Builds the block over tensors named as in FfnSpec, projections as in Linear."""
        self.spec = spec
        self.norm = RMSNorm(params["norm.weight"], spec.norm_eps)
        self.gate = Linear(params, deltas, "gate")
        self.up = Linear(params, deltas, "up")
        self.down = Linear(params, deltas, "down")

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, hidden_size] float32 -> the same."""
        normed = self.norm(x)
        activation = _ACTIVATIONS[self.spec.activation]
        return x + self.down(activation(self.gate(normed, rows)) * self.up(normed, rows), rows)
