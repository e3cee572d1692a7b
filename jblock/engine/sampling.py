"""Sampling on the device: logits in, one token a sequence out.

Both programs take the model's logits, which log-probabilities are of, and those to pick from, which
`adjust` made of them or which are the same array. So a row's token comes from the same program
whatever the other rows of its batch ask for.

Top-k and top-p find their threshold by bisection over the bits of a float instead of sorting the
vocabulary: 32 counting passes, which vectorise, against a sort, which does not.
"""

import jax
import jax.numpy as jnp

OPTION_COLUMNS = 5


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 with the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(bits: jax.Array, enough) -> jax.Array:
    """Largest uint32 t [S] for which `enough(bits >= t)` [S] holds; it holds at 0 and is monotone."""

    def narrow(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(bits >= candidate[:, None]), candidate, threshold)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros(bits.shape[0], jnp.uint32))


def keep_top(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens stay eligible: bool [S, V].

    Args:
      logits: float32 [S, V], temperature applied.
      top_k: int32 [S]; 0 keeps all. Ties with the k-th best stay, as in Hugging Face transformers.
      top_p: float32 [S]; the smallest set of best tokens whose probability, among what top-k left,
        reaches it stays (arXiv 1904.09751); ties with the last one stay.
    """
    bits = _ordered_bits(logits)
    k = jnp.where(top_k > 0, top_k, logits.shape[1])
    keep = bits >= _largest_threshold(bits, lambda m: m.sum(axis=1) >= k)[:, None]
    probs = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=1)
    # Rounding may leave the whole set short of 1, so that top_p 1 must not depend on it.
    wanted = jnp.where(top_p >= 1.0, 0.0, top_p * probs.sum(axis=1))
    p_bits = _ordered_bits(probs)
    nucleus = _largest_threshold(p_bits, lambda m: (probs * m).sum(axis=1) >= wanted)
    in_nucleus = (p_bits >= nucleus[:, None]) | (top_p >= 1.0)[:, None]
    return keep & in_nucleus


def keep_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens have at least `min_p` [S] times the best one's probability (arXiv 2407.01082): bool
    [S, V] for float32 logits [S, V], temperature applied. What top-k and top-p left out changes no
    ratio, so it may be applied before or after them."""
    return logits >= logits.max(axis=1, keepdims=True) + jnp.log(min_p)[:, None]


def draw(logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One draw a row by the Gumbel-max trick; depends on the row's seed and position alone.

    Args:
      logits: float32 [S, V], -inf where not eligible.
      seeds: uint32 [S].
      positions: int32 [S], position the drawn token will have.
    """

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(seeds, positions), axis=1)


def _finish(logits, tokens, last_tokens, meta):
    """Records the tokens on the device and packs what the host reads: [S, 3] int32 of token,
    log-probability (bits of a float32), and whether every logit was finite."""
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=1)
    finite = jnp.isfinite(logits).all(axis=1)
    seq_slots = jnp.where(meta[:, 1] > 0, meta[:, 3], last_tokens.shape[0])
    last_tokens = last_tokens.at[seq_slots].set(tokens, mode="drop")
    packed = jnp.stack(
        [tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32), finite.astype(jnp.int32)],
        axis=1,
    )
    return last_tokens, packed


def greedy(logits: jax.Array, adjusted: jax.Array, last_tokens: jax.Array, meta: jax.Array):
    """Picks the best token of every row.

    Args:
      logits: float32 [S, V] of the model.
      adjusted: float32 [S, V], those to pick from.
      last_tokens: int32 [max_num_seqs], each sequence's last token (donated).
      meta: int32 [S, 4], the leading columns of the batch's index.

    Returns:
      last_tokens, and packed int32 [S, 3] as `_finish` describes.
    """
    with jax.named_scope("sample_greedy"):
        return _finish(logits, jnp.argmax(adjusted, axis=1), last_tokens, meta)


def sampled(
    logits: jax.Array,
    adjusted: jax.Array,
    last_tokens: jax.Array,
    meta: jax.Array,
    options: jax.Array,
):
    """Like `greedy`, with options int32 [S, 5]: temperature (float32 bits), top_k, top_p (float32
    bits), seed (uint32 bits), min_p (float32 bits). Rows with temperature 0 are greedy."""
    with jax.named_scope("sample"):
        floats = jax.lax.bitcast_convert_type(options, jnp.float32)
        temperature, top_p, min_p = floats[:, 0], floats[:, 2], floats[:, 4]
        seeds = jax.lax.bitcast_convert_type(options[:, 3], jnp.uint32)
        scaled = adjusted / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        keep = keep_top(scaled, options[:, 1], top_p) & keep_min_p(scaled, min_p)
        drawn = draw(jnp.where(keep, scaled, -jnp.inf), seeds, meta[:, 0] + meta[:, 1])
        tokens = jnp.where(temperature > 0, drawn, jnp.argmax(adjusted, axis=1))
        return _finish(logits, tokens, last_tokens, meta)
