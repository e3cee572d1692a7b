"""Log-probabilities beside those of the tokens picked: the best tokens', and a prompt's own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.platform import Platform
from jblock.engine.api import MAX_TOP_LOGPROBS
from jblock.engine.config import Bucket
from jblock.engine.programs.forward import head_of, unpack
from jblock.engine.signature import Signature


def top_logprobs(logits: jax.Array) -> jax.Array:
    """The best tokens of every row.

    Args:
      logits: float32 [S, V], unmodified.

    Returns:
      int32 [S, 2K], K the smaller of MAX_TOP_LOGPROBS and V: ids, best first, of equals the lower
      one, then their log-probabilities (bits of float32).
    """
    with jax.named_scope("top_logprobs"):
        best, ids = jax.lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[1]))
        logprobs = best - jax.nn.logsumexp(logits, axis=1, keepdims=True)
        bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
        return jnp.concatenate([ids.astype(jnp.int32), bits], axis=1)


def best_tokens(row: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The first `count` (id, log-probability) pairs of a row of `top_logprobs`, on the host."""
    ids, logprobs = np.split(row, 2)
    pairs = zip(ids[:count].tolist(), logprobs[:count].view(np.float32).tolist(), strict=True)
    return tuple(pairs)


def prompt_logprobs_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., jax.Array]:
    """(params, tables, registers, index, targets int32 [S, Q]) -> int32 [S, Q, 3]: the log-probability (bits
    of float32) that the head of this signature gives each row's target, the token that follows it in
    the prompt; that of the best token (the same); and the best token's id, of equals the lower one.

    The logits of one sequence's rows exist at a time, not those of the whole batch.
    """
    make = head_of(signature, platform)

    def score(params: Any, tables: Any, registers: jax.Array, index: jax.Array, targets: jax.Array):
        grid, _, register_rows, _ = unpack(index, bucket, platform)
        head = make(params, tables)

        def sequence(of_one):
            rows, wanted, starts, q_lens, slots = of_one
            one = dataclasses.replace(
                grid, num_seqs=1, starts=starts[None], q_lens=q_lens[None], slots=slots[None]
            )
            logits = head(registers.at[rows].get(mode="clip"), one)
            chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
            total = jax.nn.logsumexp(logits, axis=1)
            best = jnp.argmax(logits, axis=1).astype(jnp.int32)
            logprobs = jnp.stack([chosen - total, jnp.max(logits, axis=1) - total], axis=1)
            bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
            return jnp.concatenate([bits, best[:, None]], axis=1)

        with jax.named_scope("prompt_logprobs"):
            each = (register_rows, targets, grid.starts, grid.q_lens, grid.slots)
            return jax.lax.map(sequence, each)

    return score
