"""Tokens to hidden rows, and hidden rows to logits."""

import types
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jblock.blocks.linear import matmul
from jblock.blocks.norm import Norm
from jblock.blocks.platform import Platform
from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots
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
        deltas: Mapping[str, jax.Array] = types.MappingProxyType({}),
    ):
        """Builds the block over tensors named as in EmbeddingSpec, and its slot tables.

        `dtype` is that of the matmul weights: the scale is rounded to it, as Hugging Face does.
        """
        self.weight, self.mesh_axes = nnx.Param(params["weight"]), mesh_axes
        self.slots = Slots(deltas)
        self.positions = nnx.Param(params["positions.weight"]) if spec.num_positions else None
        self.scale = float(np.asarray(spec.scale, jnp.dtype(dtype)))

    def __call__(
        self, token_ids: jax.Array, positions: jax.Array, rows: Rows | None = None
    ) -> jax.Array:
        """int32 [T], int32 [T] -> float32 [T, hidden_size]; rows may be left out without slot tables."""
        x = self.slots.add_lookup("weight", self._look_up(token_ids, rows), token_ids, rows)
        x = self.slots.scaled("weight.scale", x, rows)
        if self.scale != 1.0:
            x = x * self.scale
        if rows is not None:
            x = rows.flat(self.slots.virtual("prompt", rows.by_sequence(x), rows))
        if self.positions is not None:
            # Only padding lies past the table's end, and what it holds is dropped.
            x = x + rows_of(self.positions[...], positions, rows, mode="clip")
        return x

    def _look_up(self, token_ids: jax.Array, batch: Rows | None) -> jax.Array:
        table = self.weight[...]
        if not self.mesh_axes:
            return rows_of(table, token_ids, batch)
        local = token_ids - jax.lax.axis_index(self.mesh_axes) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        rows = rows_of(table, local, batch, mode="clip")
        return jax.lax.psum(jnp.where(here[:, None], rows, 0.0), self.mesh_axes)


def rows_of(
    table: jax.Array, ids: jax.Array, batch: Rows | None, mode: str | None = None
) -> jax.Array:
    """Rows of a table [n, width], float32 [T, width], for ids int32 [T]; mode as `jax.numpy` indexing has it.
    On a CPU bfloat16 is gathered as whole numbers of 16 bits: XLA would convert the whole table first."""
    if table.dtype != jnp.bfloat16 or batch is None or batch.platform.name != "cpu":
        return table.at[ids].get(mode=mode).astype(jnp.float32)
    words = jax.lax.bitcast_convert_type(table, jnp.uint16).at[ids].get(mode=mode)
    return jax.lax.bitcast_convert_type(words, table.dtype).astype(jnp.float32)


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
        deltas: Sequence[Mapping[str, jax.Array]] = ({}, {}),
    ):
        """Builds the head over the tensors of both components, and their slot tables."""
        norm, unembedding = specs
        self.norm = Norm(norm.norm, params[0], "", norm.eps, Slots(deltas[0]))
        self.slots = Slots(deltas[1])
        self.weight = nnx.Param(params[1]["weight"])
        self.softcap, self.scale = unembedding.softcap, unembedding.scale
        self.platform = platform
        self.transposed = tied or platform.out_in
        self.vocab_size, self.mesh_axes = unembedding.vocab_size, mesh_axes

    def __call__(self, x: jax.Array, rows: Rows | None = None) -> jax.Array:
        """[T, hidden_size] -> [T, vocab_size]; rows may be left out without slot tables."""
        x = self.norm(x, rows)
        logits = matmul(x, self.weight[...], self.platform, transposed=self.transposed)
        logits = self.slots.add_lora("weight", logits, x, rows)
        logits = self.slots.scaled("weight.scale", logits, rows)
        bias = self.slots.own("weight.bias", None, rows)
        logits = logits if bias is None else logits + bias
        if self.mesh_axes:
            logits = jax.lax.all_gather(logits, self.mesh_axes, axis=1, tiled=True)
            logits = logits[:, : self.vocab_size]
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
