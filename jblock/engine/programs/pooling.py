"""What a model makes of a prompt: the hidden rows behind its final norm, summed up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jblock.blocks.platform import Platform
from jblock.engine.config import Bucket
from jblock.engine.programs.forward import head_of, unpack
from jblock.engine.signature import Signature


def pooling_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., jax.Array]:
    """(params, tables, registers, index, firsts int32 [S]) -> float32 [S, 2, hidden_size]: of the rows of
    each sequence, normed, the sum of those from its first that counts on, and the last."""
    make = head_of(signature, platform)

    def pool(params: Any, tables: Any, registers: jax.Array, index: jax.Array, firsts: jax.Array):
        rows, _, register_rows, _ = unpack(index, bucket, platform)
        head = make(params, tables)
        with jax.named_scope("pooling"):
            x = head.norm(registers.at[register_rows.reshape(-1)].get(mode="clip"), rows)
            x = rows.by_sequence(x).astype(jnp.float32)
            column = jnp.arange(bucket.q_len)[None, :]
            counts = (column >= firsts[:, None]) & (column < rows.q_lens[:, None])
            last = column == rows.q_lens[:, None] - 1
            # Rows of padding may hold anything.
            total = jnp.where(counts[:, :, None], x, 0.0).sum(axis=1)
            final = jnp.where(last[:, :, None], x, 0.0).sum(axis=1)
            return jnp.stack([total, final], axis=1)

    return pool
