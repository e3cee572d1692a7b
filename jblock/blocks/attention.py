"""The attention block: norms, projections, rotary embedding, paged attention, residual."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks.linear import Linear, project
from jblock.blocks.norm import Norm
from jblock.blocks.rope import inverse_frequencies, rotate, turns
from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots
from jblock.blocks.spec import AttentionSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [S, Q, heads, d], k [S, Q, kv_heads, d], v likewise) -> [S, Q, heads, d], over cached KV too."""


class Attention(nnx.Module):
    """Grouped-query self attention with its residual. See AttentionSpec for the options."""

    def __init__(
        self,
        spec: AttentionSpec,
        params: Mapping[str, jax.Array],
        deltas: Mapping[str, jax.Array],
    ):
        """Builds the block over tensors as `layout.compute_shapes` names them, laid as in Linear."""

        def norm(name: str, there: bool) -> Norm | None:
            return Norm(spec.norm, params, f"{name}.", spec.norm_eps, slots) if there else None

        slots = self.slots = Slots(deltas)
        self.spec = spec
        self.norm = norm("norm", spec.pre_norm)
        self.q = Linear(params, deltas, "q")
        self.k = Linear(params, deltas, "k")
        self.v = Linear(params, deltas, "v")
        self.o = Linear(params, deltas, "o", partial=True)
        self.q_norm = norm("q_norm", spec.qk_norm)
        self.k_norm = norm("k_norm", spec.qk_norm)
        self.post_norm = norm("post_norm", spec.post_norm)

    def __call__(self, x: jax.Array, rows: Rows, attend: Attend) -> jax.Array:
        """[T, hidden_size] float32 -> the same; `attend` owns the KV cache."""
        spec = self.spec
        normed = x if self.norm is None else self.norm(x, rows)

        def heads(y: jax.Array, norm: Norm | None) -> jax.Array:
            if norm is not None and spec.qk_norm_joint:
                y = norm(y, rows)
            # As many heads as the device has.
            y = y.reshape(rows.num_seqs, rows.q_len, -1, spec.head_dim)
            return y if norm is None or spec.qk_norm_joint else norm(y, rows)

        q, k, v = project((self.q, self.k, self.v), normed, rows)
        q, k, v = heads(q, self.q_norm), heads(k, self.k_norm), heads(v, None)
        if spec.rope is not None:
            inv_freq = inverse_frequencies(spec.rope, spec.head_dim)
            scale, on_cpu = spec.rope.attention_factor, rows.platform.name == "cpu"
            cos, sin = turns(rows.positions, inv_freq, scale, materialized=on_cpu)
            q, k = (rotate(y, cos, sin, interleaved=spec.rope.interleaved) for y in (q, k))
        if spec.log_scale_beta:
            periods = (rows.positions // spec.log_scale_positions).astype(jnp.float32)
            q = q * (1 + spec.log_scale_beta * jnp.log1p(periods))[..., None, None]
        k, v = self._with_prefix("k", k, rows), self._with_prefix("v", v, rows)
        out = attend(q, k, v)
        out = self.o(out.reshape(x.shape[0], -1), rows)
        out = out if self.post_norm is None else self.post_norm(out, rows)
        out = out if spec.residual_scale == 1.0 else out * spec.residual_scale
        return self.slots.add_residual(x, out, rows)

    def ffn_source(self, x: jax.Array, rows: Rows) -> jax.Array | None:
        """What the ffn behind reads, of the x this block read; None: what this block wrote."""
        if self.spec.shared_norm and self.norm is not None:
            return self.norm(x, rows)
        return x if self.spec.parallel else None

    def _with_prefix(self, part: str, x: jax.Array, rows: Rows) -> jax.Array:
        """Keys or values [S, Q, heads, d], with the tuned ones in the places of virtual tokens."""
        flat = x.reshape(*x.shape[:2], -1)
        return self.slots.virtual(f"prefix.{part}", flat, rows).reshape(x.shape)
