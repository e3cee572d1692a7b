"""The rows a block works on: a static grid of sequences by tokens, flattened."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jblock.blocks.platform import Platform, here


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("starts", "q_lens", "slots"),
    meta_fields=("num_seqs", "q_len", "mesh_axes", "platform"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """One batch of rows, `num_seqs` sequences of up to `q_len` new tokens each (T = num_seqs * q_len).

    Decoding is the grid (n, 1); a chunk of prefill is (n, chunk). Row `s * q_len + i` is token `i` of
    sequence `s`; rows with `i >= q_lens[s]` are padding and never read or written elsewhere.

    Attributes:
      num_seqs: sequences in the grid (static).
      q_len: tokens per sequence in the grid (static).
      starts: int32 [num_seqs], position of each sequence's first token in this batch.
      q_lens: int32 [num_seqs], how many of its tokens are real; 0 marks an unused sequence.
      slots: int32 [num_seqs], slot of the sequence's delta in the slot tables; 0 is none.
      mesh_axes: mesh axes the inside of the blocks is split over (static); each device then has its
        share of the heads and columns, and all of every row.
      platform: what the program is compiled for (static).
    """

    num_seqs: int
    q_len: int
    starts: jax.Array
    q_lens: jax.Array
    slots: jax.Array
    mesh_axes: tuple[str, ...] = ()
    platform: Platform = dataclasses.field(default_factory=here)

    @property
    def positions(self) -> jax.Array:
        """int32 [num_seqs, q_len], position of every token in its sequence."""
        return self.starts[:, None] + jnp.arange(self.q_len, dtype=jnp.int32)

    @property
    def valid(self) -> jax.Array:
        """bool [num_seqs, q_len], False on padding."""
        return jnp.arange(self.q_len, dtype=jnp.int32) < self.q_lens[:, None]

    def by_sequence(self, x: jax.Array) -> jax.Array:
        """[T, ...] -> [num_seqs, q_len, ...]."""
        return x.reshape(self.num_seqs, self.q_len, *x.shape[1:])

    def flat(self, x: jax.Array) -> jax.Array:
        """[num_seqs, q_len, ...] -> [T, ...]."""
        return x.reshape(self.num_seqs * self.q_len, *x.shape[2:])
