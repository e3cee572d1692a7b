"""Ragged ranges cut into pieces of one size, which kernels take one by one."""

import jax
import jax.numpy as jnp


def pieces(
    begin: jax.Array, end: jax.Array, size: int, bound: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts the range begin .. end - 1 of every sequence (or group) at the multiples of `size`.

    Args:
      begin: int32 [S].
      end: int32 [S]; not over begin: no piece.
      size: length of a piece.
      bound: most pieces there can be.

    Returns:
      int32 [bound] sequence of each piece, int32 [bound] its number (it covers number * size and on), and
      int32 [] how many there are, in order of their sequences; the rest is meaningless but in range.
    """
    first = begin // size
    count = jnp.where(end > begin, (end + size - 1) // size - first, 0)
    ends = jnp.cumsum(count)
    i = jnp.arange(bound, dtype=jnp.int32)
    # A comparison with all ends: a search would be a loop, which costs a TPU more.
    seq = jnp.minimum((ends[None, :] <= i[:, None]).sum(axis=1), begin.shape[0] - 1)
    seq = seq.astype(jnp.int32)
    return seq, first[seq] + i - (ends - count)[seq], ends[-1].astype(jnp.int32)


def piece_bound(num_seqs: int, max_len: int, total: int, size: int) -> int:
    """Most pieces of `size` that ranges of at most max_len and together at most total can touch."""
    each = (max_len + size - 2) // size + 1
    return min(num_seqs * each, total // size + 2 * num_seqs)
