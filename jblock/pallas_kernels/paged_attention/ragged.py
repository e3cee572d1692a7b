"""Which rows of a flat batch belong to which sequence, and where each sequence's KV pages are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("row_starts", "q_lens", "kv_lens", "page_table"),
    meta_fields=("max_q_len", "is_grid"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """Rows of S sequences in one flat array of T rows, each sequence's new tokens in a run of its own.

    Row `row_starts[s] + i` is token `i` of sequence `s`'s new ones, at position
    `kv_lens[s] - q_lens[s] + i`. Decoding has one new token a sequence, a chunk of prefill or the
    verification of drafted tokens several, a mixed batch both. Rows in no run are padding.

    Attributes:
      row_starts: int32 [S], row of each sequence's first new token; runs do not overlap.
      q_lens: int32 [S], new tokens of each sequence, at most max_q_len; 0 marks an unused sequence.
      kv_lens: int32 [S], tokens of each sequence after this call, the new ones included.
      page_table: int32 [S, max_pages], physical page of each logical page, 0 where there is none.
      max_q_len: bound on q_lens (static).
      is_grid: row_starts is `s * max_q_len` and T is `S * max_q_len` (static); the XLA backend then
        needs no gather of rows.
    """

    row_starts: jax.Array
    q_lens: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array
    max_q_len: int
    is_grid: bool = False

    @classmethod
    def grid(
        cls, starts: jax.Array, q_lens: jax.Array, page_table: jax.Array, max_q_len: int
    ) -> "Ragged":
        """The engine's grid: `max_q_len` rows a sequence, of which the first q_lens are real. With one row a
        sequence, neighbors may be consecutive tokens of one, each of which sees those before it, where the
        backend says `JOINS_ROWS`: the verification of drafted tokens beside sequences that decode.

        Args:
          starts: int32 [S], position of each sequence's first new token.
          q_lens: int32 [S].
          page_table: int32 [S, max_pages].
          max_q_len: rows of every sequence.
        """
        return cls(
            row_starts=jnp.arange(starts.shape[0], dtype=jnp.int32) * max_q_len,
            q_lens=q_lens,
            kv_lens=starts + q_lens,
            page_table=page_table,
            max_q_len=max_q_len,
            is_grid=True,
        )

    @classmethod
    def packed(
        cls, cu_q_lens: jax.Array, kv_lens: jax.Array, page_table: jax.Array, max_q_len: int
    ) -> "Ragged":
        """Runs one behind the other: sequence s has rows cu_q_lens[s] .. cu_q_lens[s + 1] - 1.

        Args:
          cu_q_lens: int32 [S + 1], cumulative new tokens, first 0.
          kv_lens: int32 [S].
          page_table: int32 [S, max_pages].
          max_q_len: bound on the new tokens of one sequence.
        """
        return cls(
            row_starts=cu_q_lens[:-1],
            q_lens=cu_q_lens[1:] - cu_q_lens[:-1],
            kv_lens=kv_lens,
            page_table=page_table,
            max_q_len=max_q_len,
        )

    @property
    def num_seqs(self) -> int:
        """S, unused sequences included."""
        return self.q_lens.shape[0]
