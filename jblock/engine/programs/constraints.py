"""What a grammar forbids, taken out of the logits before anything else is done to them."""

import jax
import jax.numpy as jnp


def mask_words(vocab_size: int) -> int:
    """Words of a row's mask."""
    return -(-vocab_size // 32)


def constrain(logits: jax.Array, meta: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Leaves the tokens that may follow.

    Args:
      logits: float32 [S, V].
      meta: int32 [S, 4], the leading columns of the batch's index.
      masks: int32 [S, 1 + W]: whether the row sits out, since its mask is not there; then the bits of the
        token ids that may follow, the lowest first.

    Returns:
      logits with -inf in place of the others; meta, in which rows that sit out have no tokens, so that
      nothing of them is recorded.
    """
    with jax.named_scope("constrain"):
        vocab = logits.shape[1]
        words = jax.lax.bitcast_convert_type(masks[:, 1:], jnp.uint32)
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed = bits.reshape(words.shape[0], -1)[:, :vocab] > 0
        count = jnp.where(masks[:, 0] > 0, 0, meta[:, 1])
        return jnp.where(allowed, logits, -jnp.inf), meta.at[:, 1].set(count)
