"""The attention block: norm, projections, rotary embedding, paged attention, residual."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jblock.blocks.linear import Linear
from jblock.blocks.norm import RMSNorm
from jblock.blocks.rope import inverse_frequencies, rotate
from jblock.blocks.rows import Rows
from jblock.blocks.spec import AttentionSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [S, Q, heads, d], k [S, Q, kv_heads, d], v likewise) -> [S, Q, heads, d], over cached KV too."""


class Attention(nnx.Module):
    """Pre-norm grouped-query self attention with its residual. See AttentionSpec for the options."""

    def __init__(
        self,
        spec: AttentionSpec,
        params: Mapping[str, jax.Array],
        deltas: Mapping[str, jax.Array],
    ):
        """Builds the block over tensors named as in AttentionSpec, projections as in Linear."""
        self.spec = spec
        self.norm = RMSNorm(params["norm.weight"], spec.norm_eps)
        self.q = Linear(params, deltas, "q")
        self.k = Linear(params, deltas, "k")
        self.v = Linear(params, deltas, "v")
        self.o = Linear(params, deltas, "o")
        self.q_norm = RMSNorm(params["q_norm.weight"], spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(params["k_norm.weight"], spec.norm_eps) if spec.qk_norm else None

    def __call__(self, x: jax.Array, rows: Rows, attend: Attend) -> jax.Array:
        """[T, hidden_size] float32 -> the same; `attend` owns the KV cache."""
        spec = self.spec
        normed = self.norm(x)

        def heads(projection: Linear, count: int) -> jax.Array:
            return rows.by_sequence(projection(normed, rows)).reshape(
                rows.num_seqs, rows.q_len, count, spec.head_dim
            )

        q, k, v = (
            heads(self.q, spec.num_heads),
            heads(self.k, spec.num_kv_heads),
            heads(self.v, spec.num_kv_heads),
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        inv_freq = inverse_frequencies(spec.rope, spec.head_dim)
        q, k = rotate(q, rows.positions, inv_freq), rotate(k, rows.positions, inv_freq)
        out = attend(q, k, v)
        return x + self.o(out.reshape(x.shape[0], spec.num_heads * spec.head_dim), rows)
