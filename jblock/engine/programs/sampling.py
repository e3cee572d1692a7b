"""Sampling on the device: logits in, one token a sequence out.

Both programs take the model's logits, which log-probabilities are of, and those to pick from, which
`adjust` made of them or which are the same array. So a row's token comes from the same program
whatever the other rows of its batch ask for.

A row whose top-k, top-p or min-p leaves only some of its best CANDIDATES tokens, as nearly all do, is
settled among those. For the others top-k and top-p find their threshold by bisection over the bits of a
float instead of sorting the vocabulary: 32 counting passes, which vectorize, against a sort, which does
not. Which of the two a row takes depends on the row alone.
"""

import jax
import jax.numpy as jnp

CANDIDATES = 64
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


def noise(seeds: jax.Array, positions: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise, a function of seed, position and token id alone, so that it may be had for
    a few tokens of a vocabulary: a counter through the finaliser of MurmurHash3, twice, under a key of
    its own for each seed and position. Threefry takes eight times as long.

    Args:
      seeds: uint32 [S].
      positions: int32 [S], position the drawn token will have.
      ids: int32 [S, N] or [1, N].

    Returns:
      float32 [S, N].
    """
    golden = jnp.uint32(0x9E3779B9)
    key = _mix(_mix(seeds + golden) + golden * positions.astype(jnp.uint32))[:, None]
    bits = _mix(_mix(ids.astype(jnp.uint32) * golden + key) ^ _mix(~key))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def best_token(logits: jax.Array) -> jax.Array:
    """int32 [S]: the first of the best of float32 [S, V]. Two passes that vectorize, which argmax does
    not on CPU."""
    vocab = logits.shape[1]
    is_best = logits == logits.max(axis=1, keepdims=True)
    index = jnp.where(is_best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return index.min(axis=1)


def _draw(logits, top_k, top_p, min_p, seeds, positions):
    """One draw a row of float32 [S, V] by the Gumbel-max trick, over the whole vocabulary."""
    everything = jnp.ones(logits.shape, bool)
    keep = jax.lax.cond(
        jnp.any((top_k > 0) | (top_p < 1.0)),
        lambda: keep_top(logits, top_k, top_p),
        lambda: everything,
    )
    keep &= keep_min_p(logits, min_p)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    return best_token(jnp.where(keep, logits + noise(seeds, positions, ids), -jnp.inf))


def _draw_candidates(logits, top_k, top_p, min_p, seeds, positions):
    """The same among the best tokens, and bool [S]: whether none but those were eligible."""
    count = min(CANDIDATES, logits.shape[1])
    all_there = count == logits.shape[1]
    # Without barriers XLA turns it into a sort of everything; with one around both its compiler for GPUs
    # aborts, which takes every user of a top-k for one of its two results.
    values, ids = map(jax.lax.optimization_barrier, jax.lax.top_k(logits, count))
    floor = values[:, -1:]

    def inside(threshold):
        # Tokens equal to the last candidate may have been left out, but where they are forbidden.
        return ((threshold > floor) | jnp.isneginf(floor))[:, 0] | all_there

    def at(index):
        return jnp.take_along_axis(values, index[:, None], axis=1)

    top_k = jnp.where(top_k > 0, top_k, logits.shape[1])
    k_known = top_k <= count
    k_value = jnp.where(k_known[:, None], at(jnp.minimum(top_k, count) - 1), -jnp.inf)
    eligible = values >= k_value
    # What top-p shares out: all that top-k left, which is here or is the whole vocabulary.
    left = jnp.where(eligible, values, -jnp.inf)
    total = jnp.where(k_known, jax.nn.logsumexp(left, axis=1), jax.nn.logsumexp(logits, axis=1))
    reached = jnp.cumsum(jnp.exp(left - total[:, None]), axis=1) >= top_p[:, None]
    p_known = (top_p < 1.0) & reached.any(axis=1)
    p_value = jnp.where(p_known[:, None], at(jnp.argmax(reached, axis=1)), -jnp.inf)
    bound = values[:, :1] + jnp.log(min_p)[:, None]
    eligible &= (values >= p_value) & (values >= bound)
    settled = inside(k_value) | inside(p_value) | inside(bound)
    settled &= (top_p >= 1.0) | k_known | (top_k >= logits.shape[1])
    scores = jnp.where(eligible, values + noise(seeds, positions, ids), -jnp.inf)
    best = jnp.argmax(scores, axis=1)
    return jnp.take_along_axis(ids, best[:, None], axis=1)[:, 0], settled


def _finish(logits, tokens, last_tokens, meta):
    """Records the tokens on the device and packs what the host reads: [S, 3] int32 of token,
    log-probability (bits of a float32), and whether every logit was finite."""
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    total = jax.nn.logsumexp(logits, axis=1)
    logprobs = chosen - total
    # NaN and inf reach the total, -inf the least; to ask every logit takes passes of its own.
    finite = jnp.isfinite(total) & jnp.isfinite(logits.min(axis=1))
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
        return _finish(logits, best_token(adjusted), last_tokens, meta)


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
        settings = options[:, 1], top_p, min_p, seeds, meta[:, 0] + meta[:, 1]
        drawn, settled = _draw_candidates(scaled, *settings)
        settled |= temperature <= 0
        drawn = jax.lax.cond(
            settled.all(),
            lambda: drawn,
            lambda: jnp.where(settled, drawn, _draw(scaled, *settings)),
        )
        tokens = jnp.where(temperature > 0, drawn, best_token(adjusted))
        return _finish(logits, tokens, last_tokens, meta)
