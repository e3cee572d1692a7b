"""Tokens to hidden rows, and hidden rows to logits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jblock.blocks.linear import matmul
from jblock.blocks.norm import Norm
from jblock.blocks.platform import Platform
from jblock.blocks.spec import EmbeddingSpec, NormSpec, UnembeddingSpec


class Embedding(nnx.Module):
    """Looks token ids, and where there is a table their positions, up. See EmbeddingSpec.

    Split over mesh axes, each device has a run of the tokens' table, and zeros for the others' tokens.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        params: Mapping[str, jax.Array],
        dtype: str,
        mesh_axes: tuple[str, ...] = (),
    ):
        """Builds the block over tensors named as in EmbeddingSpec.

        `dtype` is that of the matmul weights: the scale is rounded to it, as Hugging Face does.
        """
        self.weight, self.mesh_axes = nnx.Param(params["weight"]), mesh_axes
        self.positions = nnx.Param(params["positions.weight"]) if spec.num_positions else None
        self.scale = float(np.asarray(spec.scale, jnp.dtype(dtype)))

    def __call__(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 [T], int32 [T] -> float32 [T, hidden_size]."""
        x = self._look_up(token_ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            # Only padding lies past the table's end, and what it holds is dropped.
            x = x + self.positions[...].at[positions].get(mode="clip")
        return x

    def _look_up(self, token_ids: jax.Array) -> jax.Array:
        table = self.weight[...]
        if not self.mesh_axes:
            return table[token_ids].astype(jnp.float32)
        local = token_ids - jax.lax.axis_index(self.mesh_axes) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        rows = table.at[local].get(mode="clip").astype(jnp.float32)
        return jax.lax.psum(jnp.where(here[:, None], rows, 0.0), self.mesh_axes)


class Head(nnx.Module):
    """Final norm and unembedding: hidden rows to float32 logits.

    The weight lies as projections do, or is the embedding's own `[vocab_size, hidden_size]` when tied, so
    that a tied table is held once. Split over mesh axes, each device has a run of the vocabulary, filled up
    at its end to equal runs.
    """

    def __init__(
        self,
        specs: tuple[NormSpec, UnembeddingSpec],
        params: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]],
        platform: Platform,
        *,
        tied: bool,
        mesh_axes: tuple[str, ...] = (),
    ):
        norm, unembedding = specs
        self.norm = Norm(norm.norm, params[0], "", norm.eps)
        self.weight = nnx.Param(params[1]["weight"])
        self.softcap, self.platform = unembedding.softcap, platform
        self.transposed = tied or platform.out_in
        self.vocab_size, self.mesh_axes = unembedding.vocab_size, mesh_axes

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, hidden_size] -> [T, vocab_size]."""
        logits = matmul(self.norm(x), self.weight[...], self.platform, transposed=self.transposed)
        if self.mesh_axes:
            logits = jax.lax.all_gather(logits, self.mesh_axes, axis=1, tiled=True)
            logits = logits[:, : self.vocab_size]
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
