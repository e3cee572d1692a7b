"""The feed-forward block with its residual."""

from collections.abc import Mapping

import jax
from flax import nnx

from jblock.blocks.activation import ACTIVATIONS
from jblock.blocks.linear import Linear, project
from jblock.blocks.norm import Norm
from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots
from jblock.blocks.spec import FfnSpec


class Ffn(nnx.Module):
    """`x + down(act(gate(norm(x))) * up(norm(x)))` (arXiv 2002.05202), or without the gate.

    gate and up stay two projections: on CPU a fused one with a split measured slower.
    """

    def __init__(
        self, spec: FfnSpec, params: Mapping[str, jax.Array], deltas: Mapping[str, jax.Array]
    ):
        """Builds the block over tensors as `layout.compute_shapes` names them, laid as in Linear."""

        def norm(name: str, there: bool) -> Norm | None:
            return Norm(spec.norm, params, f"{name}.", spec.norm_eps, slots) if there else None

        slots = self.slots = Slots(deltas)
        self.spec = spec
        self.norm = norm("norm", spec.pre_norm)
        self.gate = Linear(params, deltas, "gate") if spec.gated else None
        self.up = Linear(params, deltas, "up")
        self.down = Linear(params, deltas, "down", partial=True)
        self.post_norm = norm("post_norm", spec.post_norm)

    def __call__(self, x: jax.Array, rows: Rows, source: jax.Array | None = None) -> jax.Array:
        """[T, hidden_size] float32 -> the same.

        Args:
          x: what is added to.
          rows: of the batch.
          source: what the layer reads, where that is not x (a parallel residual).
        """
        source = x if source is None else source
        normed = source if self.norm is None else self.norm(source, rows)
        activation = ACTIVATIONS[self.spec.activation]
        if self.gate is None:
            inner = activation(self.up(normed, rows))
        else:
            gate, up = project((self.gate, self.up), normed, rows)
            inner = activation(gate) * up
        out = self.down(inner, rows)
        out = out if self.post_norm is None else self.post_norm(out, rows)
        scale = self.spec.residual_scale
        return self.slots.add_residual(x, out if scale == 1.0 else out * scale, rows)
