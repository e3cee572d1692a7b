"""What a request changes about logits before a token is picked: penalties, biases, forbidden ends.

The tokens a sequence has seen are counted on the device, so that the next step can be enqueued before
this one's tokens were read: `counts [max_num_seqs, vocab]` holds for every sequence slot how often
each token was generated, and in one bit whether it was in the prompt.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jblock.engine.api import MAX_END_IDS, MAX_LOGIT_BIAS
from jblock.engine.config import MAX_DRAFT_TOKENS

# Columns of a row of controls: repetition, presence and frequency penalty (float32 bits), whether
# the last token is to be counted; then ids, then what is added to them (float32 bits); then ids that are
# drafted in front of the row, and count as generated for it alone.
FIXED_COLUMNS = 4
BIAS_COLUMNS = MAX_LOGIT_BIAS + MAX_END_IDS
DRAFT_COLUMNS = MAX_DRAFT_TOKENS
CONTROL_COLUMNS = FIXED_COLUMNS + 2 * BIAS_COLUMNS + DRAFT_COLUMNS

IN_PROMPT = 1 << 30


def adjust(
    logits: jax.Array,
    counts: jax.Array,
    last_tokens: jax.Array,
    meta: jax.Array,
    controls: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Counts the last tokens, then applies biases, the repetition penalty (arXiv 1909.05858, section
    4.1, over prompt and generated tokens, as in Hugging Face transformers), and the presence and
    frequency penalties (over generated tokens, as in OpenAI's API), in this order.

    Args:
      logits: float32 [S, V].
      counts: int32 [max_num_seqs, V] (donated).
      last_tokens: int32 [max_num_seqs], each sequence's last token.
      meta: int32 [S, 4], the leading columns of the batch's index.
      controls: int32 [S, CONTROL_COLUMNS]; a row of neutral values leaves its logits bit for bit.

    Returns:
      adjusted logits float32 [S, V], and counts.
    """
    with jax.named_scope("adjust"):
        slots = meta[:, 3]
        counted = jnp.where((controls[:, 3] > 0) & (meta[:, 1] > 0), slots, counts.shape[0])
        counts = counts.at[counted, last_tokens[slots]].add(1, mode="drop")
        rows = jnp.arange(logits.shape[0])[:, None]
        seen = counts[slots].at[rows, controls[:, -DRAFT_COLUMNS:]].add(1, mode="drop")
        generated = (seen & (IN_PROMPT - 1)).astype(jnp.float32)

        floats = jax.lax.bitcast_convert_type(controls, jnp.float32)
        repetition, presence, frequency = floats[:, 0:1], floats[:, 1:2], floats[:, 2:3]
        ids = controls[:, FIXED_COLUMNS : FIXED_COLUMNS + BIAS_COLUMNS]
        biases = floats[:, FIXED_COLUMNS + BIAS_COLUMNS : -DRAFT_COLUMNS]
        x = logits.at[rows, ids].add(biases, mode="drop")
        punished = jnp.where(x < 0, x * repetition, x / repetition)
        x = jnp.where(seen > 0, punished, x)
        x = x - jnp.where(generated > 0, presence, 0.0) - frequency * generated
        return x, counts


@jax.named_scope("set_counts")
def set_counts(counts: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
    """Writes one sequence's counts when it begins, or begins again.

    Args:
      counts: int32 [max_num_seqs, V] (donated).
      slot: int32 [1], the sequence's slot.
      row: int32 [V] as `count_row` makes it.
    """
    return counts.at[slot[0]].set(row)


def count_row(prompt: tuple[int, ...], generated: list[int], width: int) -> np.ndarray:
    """int32 [width]: what a sequence has seen so far."""
    row = np.zeros(width, np.int32)
    row[list(prompt)] = IN_PROMPT
    np.add.at(row, generated, 1)
    return row
