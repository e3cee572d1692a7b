"""Tokens to hidden rows, and hidden rows to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks.linear import OUT_IN, matmul
from jblock.blocks.norm import RMSNorm


class Embedding(nnx.Module):
    """Looks token ids up in `weight [vocab_size, hidden_size]`."""

    def __init__(self, weight: jax.Array):
        self.weight = nnx.Param(weight)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32 [T] -> float32 [T, hidden_size]."""
        return self.weight[...][token_ids].astype(jnp.float32)


class Head(nnx.Module):
    """Final norm and unembedding: hidden rows to float32 logits.

    The weight lies as in Linear, or as the embedding's own `[vocab_size, hidden_size]` when tied, so
    that a tied table is held once.
    """

    def __init__(self, norm_weight: jax.Array, eps: float, weight: jax.Array, *, tied: bool):
        self.norm = RMSNorm(norm_weight, eps)
        self.weight = nnx.Param(weight)
        self.tied = tied

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, hidden_size] -> [T, vocab_size]."""
        return matmul(self.norm(x), self.weight[...], transposed=self.tied or OUT_IN)
