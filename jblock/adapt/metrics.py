"""How far what two chains put out is apart, on the same rows: the scores of an edge.

Intervals are 95% ones. Tokens of a row depend on each other, so rows are what is sampled; task items are
paired, each answered by both chains.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import forward
from jblock.adapt.forward import Weights
from jblock.adapt.probe import ProbeData, Rows
from jblock.blocks.spec import AttentionSpec
from jblock.zoo.edge_records import Score

_TOKENS = 4096  # put through a chain at once
_Z = 1.959964


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What one chain makes of a probe.

    Attributes:
      hidden: float32 [B, T, d] of the text, before the final norm.
      log_probs: float32 [B, T, vocab_size] of the text's next tokens.
      nats: float64 [B], mean cross entropy of a row of text.
      right: bool [items]; None without a task.
    """

    hidden: list[np.ndarray]
    log_probs: list[np.ndarray]
    nats: np.ndarray
    right: np.ndarray | None

    @property
    def perplexity(self) -> float:
        """Of the text, per token."""
        return math.exp(float(self.nats.mean()))

    @property
    def accuracy(self) -> float | None:
        """Share of the items answered exactly."""
        return None if self.right is None else float(self.right.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixActivations:
    """Hidden rows behind the first steps of a chain: what chains that differ above need not compute again.

    Attributes:
      count: those steps.
      depth: attention layers among them.
      text: float32 [B, T, d] of each batch of text.
      items: the same of task items.
    """

    count: int
    depth: int
    text: list[jax.Array]
    items: list[jax.Array]


def below(weights: Weights, data: ProbeData, count: int = 1) -> PrefixActivations:
    """Runs the first `count` steps of a chain over a probe."""
    part = weights.part(0, count)

    def run(rows: Rows | None) -> list[jax.Array]:
        batches = [] if rows is None else _batches(rows)
        return [_below(part.specs, part.tensors, jnp.asarray(tokens)) for tokens, _ in batches]

    depth = sum(isinstance(s, AttentionSpec) for s in part.specs)
    return PrefixActivations(count, depth, run(data.text), run(data.items))


def outputs(weights: Weights, data: ProbeData, known: PrefixActivations | None = None) -> Outputs:
    """Runs a chain over a probe. Holds the text's log-probabilities: 4 bytes x tokens x vocabulary.

    Args:
      weights: of all steps.
      data: what to put through.
      known: of its first steps, if they were run before.
    """
    known = below(weights, data) if known is None else known
    part = weights.part(known.count, len(weights.specs))
    form = (part.specs, known.depth)
    hidden, log_probs, nats, right = [], [], [], []
    for x, (tokens, target) in zip(known.text, _batches(data.text), strict=True):
        h, p, n = _text(form, part.tensors, x, jnp.asarray(tokens), jnp.asarray(target))
        hidden.append(np.asarray(h))
        log_probs.append(np.asarray(p))
        nats.append(np.asarray(n, np.float64))
    if data.items is None:
        return Outputs(hidden, log_probs, np.concatenate(nats)[: len(data.text)], None)
    for x, (tokens, target) in zip(known.items, _batches(data.items), strict=True):
        hits = _exact(form, part.tensors, x, jnp.asarray(tokens), jnp.asarray(target))
        right.append(np.asarray(hits))
    every = np.concatenate(right)[: len(data.items)]
    return Outputs(hidden, log_probs, np.concatenate(nats)[: len(data.text)], every)


def scores(original: Outputs, substitute: Outputs) -> dict[str, Score]:
    """The scores of outputs of an edge, see MEASURES."""
    errors, kls, same = [], [], []
    for h0, h1, p0, p1 in zip(
        original.hidden, substitute.hidden, original.log_probs, substitute.log_probs, strict=True
    ):
        error, kl, agree = _compare(h0, h1, p0, p1)
        errors.append(error)
        kls.append(kl)
        same.append(agree)
    rows = len(original.nats)
    positions = rows * (original.log_probs[0].shape[1])
    found = {
        "kl": mean_score(np.concatenate(kls)[:rows], positions, low=0.0),
        "top1_agreement": mean_score(np.concatenate(same)[:rows], positions, low=0.0, high=1.0),
    }
    if original.hidden[0].shape == substitute.hidden[0].shape:  # else they cannot be compared
        found["hidden_error"] = mean_score(np.concatenate(errors)[:rows], positions, low=0.0)
    change = mean_score(substitute.nats - original.nats, positions)
    found["perplexity_change"] = Score(
        value=math.expm1(change.value),
        low=math.expm1(change.low or 0.0),
        high=math.expm1(change.high or 0.0),
        count=positions,
    )
    if original.right is not None and substitute.right is not None:
        found["accuracy_change"] = paired(original.right, substitute.right)
    return found


def mean_score(
    by_row: np.ndarray, count: int, low: float = -math.inf, high: float = math.inf
) -> Score:
    """The mean over rows with its interval (normal approximation), kept within `low` and `high`."""
    value = float(np.mean(by_row))
    width = _Z * float(np.std(by_row, ddof=1)) / math.sqrt(len(by_row)) if len(by_row) > 1 else 0.0
    return Score(
        value=value, low=max(value - width, low), high=min(value + width, high), count=count
    )


def paired(original: np.ndarray, substitute: np.ndarray) -> Score:
    """The change of a share of right items, both bool [items], with the interval of Agresti and Min (2005):
    half an item is added to each of the four cells, so that no disagreement seen is not taken for none."""
    n = len(original)
    gained = int(np.sum(substitute & ~original))
    lost = int(np.sum(original & ~substitute))
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    centre = (b - c) / m
    width = _Z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    value = (gained - lost) / n
    return Score(
        value=value, low=min(centre - width, value), high=max(centre + width, value), count=n
    )


def _batches(rows: Rows):
    """Equal batches, so that one program serves; the last is filled up with rows of its own."""
    size = max(1, min(len(rows), _TOKENS // rows.tokens.shape[1]))
    for begin in range(0, len(rows), size):
        at = np.arange(begin, begin + size) % len(rows)
        yield rows.tokens[at], rows.target[at]


@functools.partial(jax.jit, static_argnums=0)
def _below(specs, tensors, tokens):
    weights = Weights(specs, tensors)
    return forward.run(weights.part(1, len(specs)), forward.embed(weights, tokens))


def _above(form, tensors, x):
    """Last hidden rows and logits, from the rows `x` that lie below these steps."""
    specs, depth = form
    weights = Weights(specs, tensors)
    x = forward.run(weights.part(0, len(specs) - 2), x, depth)
    return x, forward.head(weights, x)


@functools.partial(jax.jit, static_argnums=0)
def _text(form, tensors, x, tokens, target):
    hidden, logits = _above(form, tensors, x)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    counts = target[:, 1:]
    nats = -jnp.sum(jnp.where(counts, picked, 0.0), axis=1) / jnp.sum(counts, axis=1)
    return hidden, log_probs, nats


@functools.partial(jax.jit, static_argnums=0)
def _exact(form, tensors, x, tokens, target):
    """bool [B]: whether each token that counts is the best one after those before it."""
    _, logits = _above(form, tensors, x)
    best = jnp.argmax(logits[:, :-1], axis=-1)
    return jnp.all((best == tokens[:, 1:]) | ~target[:, 1:], axis=1)


@jax.jit
def _compare(h0, h1, p0, p1):
    """Means over each row's tokens, all [B]."""
    if h0.shape == h1.shape:
        size = jnp.maximum(jnp.linalg.norm(h0, axis=-1), 1e-30)
        error = jnp.mean(jnp.linalg.norm(h1 - h0, axis=-1) / size, axis=1)
    else:
        error = jnp.full(h0.shape[0], jnp.nan)
    kl = jnp.mean(jnp.maximum(jnp.sum(jnp.exp(p0) * (p0 - p1), axis=-1), 0.0), axis=1)
    same = jnp.mean(jnp.argmax(p0, -1) == jnp.argmax(p1, -1), axis=1)
    return error, kl, same
