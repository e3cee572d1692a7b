"""What chains make of a probe, and how far apart two of them are, row by row and item by item.

Chains go through a probe together, layer by layer (`layers.py`): a layer is read once for all of them, and
chains that begin alike share what they compute. Of each chain the last hidden rows are kept, not its
logits, which would take vocabulary size / hidden size times as much memory.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import layers, scores
from jblock.adapt.forward import Weights
from jblock.adapt.layers import Plan
from jblock.adapt.probe import ProbeData, Rows
from jblock.zoo.edge_records import Score
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

Steps = tuple[Step, ...]
_BATCH_TOKENS = 2048  # put through a layer at once
_HEAD_TOKENS = 128  # whose logits, and those of the original, are in memory at once
LIVE_BYTES = 512 << 20  # hidden rows of all chains that go through the layers together


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What one chain makes of a probe.

    Attributes:
      nats: float64 [B], mean cross entropy of a row of text.
      right: bool [items], whether each token of the answer is the best one; None without a task.
    """

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
class Comparison:
    """One chain beside another on the same probe.

    Attributes:
      original: what the other makes of it.
      substitute: what this one makes of it.
      kl: float64 [B], KL(original || substitute) in nats, mean over a row's tokens.
      same: float64 [B], share of a row's tokens with the same best next token.
      error: float64 [B], |difference| / |original| of the last hidden rows; None where they differ in size.
      positions: of text that count in a row.
    """

    original: Outputs
    substitute: Outputs
    kl: np.ndarray
    same: np.ndarray
    error: np.ndarray | None
    positions: int

    def scores(self) -> dict[str, Score]:
        """The scores of outputs of an edge, see edge_records.MEASURES."""
        count = len(self.kl) * self.positions
        found = {
            "kl": scores.mean_score(self.kl, count, low=0.0),
            "top1_agreement": scores.mean_score(self.same, count, low=0.0, high=1.0),
            "perplexity_change": scores.perplexity_change(
                self.original.nats, self.substitute.nats, count
            ),
        }
        if self.error is not None:
            found["hidden_error"] = scores.mean_score(self.error, count, low=0.0)
        if self.original.right is not None and self.substitute.right is not None:
            found["accuracy_change"] = scores.paired(self.original.right, self.substitute.right)
        return found

    def half(self, second: bool) -> "Comparison":
        """The half of the probe to choose on (False) or to score on (True): the first or last rows of the
        text, even or odd items."""
        rows = slice(len(self.kl) // 2, None) if second else slice(None, len(self.kl) // 2)
        items = slice(int(second), None, 2)

        def part(of: Outputs) -> Outputs:
            return Outputs(of.nats[rows], None if of.right is None else of.right[items])

        error = None if self.error is None else self.error[rows]
        halves = part(self.original), part(self.substitute)
        return Comparison(*halves, self.kl[rows], self.same[rows], error, self.positions)


@dataclasses.dataclass(frozen=True, eq=False)
class _Hidden:
    """Last hidden rows of a chain: float32 [B, T, d] of each batch of text and of items."""

    text: list[jax.Array]
    items: list[jax.Array]


class Evaluator:
    """A chain on its probe, and others beside it.

    Attributes:
      original: what the chain makes of the probe.
    """

    def __init__(self, zoo: Zoo, steps: Sequence[Step], data: ProbeData):
        """Runs the chain.

        Raises:
          ZooError: a component is missing or damaged, or a delta cannot be merged.
        """
        self._zoo, self._steps, self._data = zoo, tuple(steps), data
        hidden = self._hidden([self._steps])[0]
        (self._reference,) = (_on_host(hidden),)
        ((self.original, _),) = self._outputs([self._steps], [hidden], compared=False)

    def measure(
        self, chains: Sequence[Sequence[Step]], on_done: Callable[[], object] = lambda: None
    ) -> list[Comparison]:
        """Runs chains of the same vocabulary beside the original.

        Args:
          chains: steps of each; those that begin as the original does share its computation.
          on_done: called after each.

        Raises:
          ZooError: as `Evaluator`.
        """
        found: list[Comparison] = []
        for group in self._groups([tuple(c) for c in chains]):
            hidden = self._hidden(group)
            for outputs, (kl, same, error) in self._outputs(group, hidden, compared=True):
                found.append(
                    Comparison(
                        self.original,
                        outputs,
                        kl,
                        same,
                        error,
                        self._data.text.tokens.shape[1],
                    )
                )
                on_done()
        return found

    def _groups(self, chains: Sequence[Steps]) -> Iterator[list[Steps]]:
        """As many chains at a time as their hidden rows have room."""
        tokens = self._data.text.tokens.size
        tokens += 0 if self._data.items is None else self._data.items.tokens.size
        group: list[Steps] = []
        used = 0
        for chain in chains:
            width = max(
                getattr(self._zoo.component(s.component).spec, "hidden_size", 0) for s in chain[:2]
            )
            size = 4 * width * tokens
            if group and used + size > LIVE_BYTES:
                yield group
                group, used = [], 0
            group.append(chain)
            used += size
        if group:
            yield group

    def _hidden(self, chains: Sequence[Steps]) -> list[_Hidden]:
        """The last hidden rows of some chains, which go through the layers side by side."""
        plans = [layers.plan(self._zoo, steps) for steps in chains]
        # Chains that were alike so far share one state, under what they have in common.
        states: dict[tuple[Steps, ...], _Hidden] = {}
        for embedding in dict.fromkeys(p.embedding for p in plans):
            weights = layers.load(self._zoo, embedding)
            states[(embedding,)] = _Hidden(
                [layers.embed(weights, tokens) for tokens, _ in batches(self._data.text)],
                []
                if self._data.items is None
                else [layers.embed(weights, tokens) for tokens, _ in batches(self._data.items)],
            )
            del weights
        done: dict[tuple[Steps, ...], _Hidden] = {}
        for at in range(max(len(p.layers) for p in plans)):
            # Layer -> the states it takes further, each with what it is then called.
            work: dict[Steps, dict[tuple[Steps, ...], int]] = defaultdict(dict)
            for p in plans:
                before = _name(p, at)
                if at < len(p.layers):
                    work[p.layers[at].steps][before] = p.layers[at].depth
                elif before in states:
                    done[before] = states[before]
            after: dict[tuple[Steps, ...], _Hidden] = {}
            order = list(work)
            for steps, weights in zip(order, layers.loaded(self._zoo, order), strict=True):
                for before, depth in work[steps].items():
                    after[(*before, steps)] = _advance(weights, states[before], depth)
            states = after
        done |= states
        return [done[_name(p, len(p.layers))] for p in plans]

    def _outputs(
        self, chains: Sequence[Steps], hidden: Sequence[_Hidden], compared: bool
    ) -> Iterator[tuple[Outputs, tuple[np.ndarray, np.ndarray, np.ndarray | None]]]:
        """Outputs of each chain and, if it is `compared`, kl, same and error of each row."""
        reference = layers.load(self._zoo, self._steps[-2:]) if compared else None
        heads: dict[Steps, Weights] = {}
        for steps, rows in zip(chains, hidden, strict=True):
            if steps[-2:] not in heads:
                # The original's own is not read again: a head is as large as many layers.
                heads.clear()
                own = reference if steps[-2:] == self._steps[-2:] else None
                heads[steps[-2:]] = own or layers.load(self._zoo, steps[-2:])
            head = heads[steps[-2:]]
            beside = self._reference.text if compared else [None] * len(rows.text)
            nats, kl, same, error = [], [], [], []
            for x, x0, (tokens, target) in zip(
                rows.text, beside, batches(self._data.text), strict=True
            ):
                for row in range(len(x)):
                    n, k, s, e = _row(head, x[row], reference, x0, row, tokens[row], target[row])
                    nats.append(n)
                    kl.append(k)
                    same.append(s)
                    error.append(e)
            count = len(self._data.text)
            right = self._right(head, rows.items)
            found = [np.array(v[:count], np.float64) for v in (kl, same, error)]
            apart = None if np.isnan(found[2]).any() else found[2]
            yield Outputs(np.array(nats[:count], np.float64), right), (found[0], found[1], apart)

    def _right(self, head: Weights, hidden: Sequence[jax.Array]) -> np.ndarray | None:
        """bool [items]: whether each token that counts is the best one after those before it."""
        if self._data.items is None:
            return None
        right = []
        for x, (tokens, target) in zip(hidden, batches(self._data.items), strict=True):
            rows, at = np.nonzero(target[:, 1:])
            wanted = tokens[rows, at + 1]
            hits = np.ones(len(x), bool)
            for begin in range(0, len(rows), _HEAD_TOKENS):
                part = np.resize(
                    np.arange(begin, min(begin + _HEAD_TOKENS, len(rows))), _HEAD_TOKENS
                )
                best = np.asarray(_best(head.specs, head.tensors, x[rows[part], at[part]]))
                np.logical_and.at(hits, rows[part], best == wanted[part])
            right.append(hits)
        return np.concatenate(right)[: len(self._data.items)]


def batches(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and target [B, T] of equal batches, so that one program serves; the last is filled up with
    rows of its own."""
    size = max(1, min(len(rows), _BATCH_TOKENS // rows.tokens.shape[1]))
    for begin in range(0, len(rows), size):
        at = np.arange(begin, begin + size) % len(rows)
        yield rows.tokens[at], rows.target[at]


def logits_bytes(vocabulary: int) -> int:
    """Of the logits and probabilities of two chains that are in memory at once."""
    return 6 * 4 * _HEAD_TOKENS * vocabulary


def outputs(zoo: Zoo, steps: Sequence[Step], data: ProbeData) -> Outputs:
    """What a chain makes of a probe."""
    return Evaluator(zoo, steps, data).original


def _name(plan: Plan, count: int) -> tuple[Steps, ...]:
    return (plan.embedding, *(layer.steps for layer in plan.layers[:count]))


def _advance(weights: Weights, state: _Hidden, depth: int) -> _Hidden:
    return _Hidden(
        [layers.through(weights, x, depth) for x in state.text],
        [layers.through(weights, x, depth) for x in state.items],
    )


def _on_host(hidden: _Hidden) -> _Hidden:
    return _Hidden([np.asarray(x) for x in hidden.text], [])  # type: ignore[misc]


def _row(head, x, reference, x0, row, tokens, target):
    """nats, kl, same and error of one row of text [T, d], some tokens at a time."""
    length = len(tokens)
    sums = np.zeros(5)
    counted = int(target[1:].sum())
    following = np.append(tokens[1:], 0)
    counts = np.append(target[1:], False)
    for begin in range(0, length, _HEAD_TOKENS):
        at = slice(begin, min(begin + _HEAD_TOKENS, length))
        part = (x[at], jnp.asarray(following[at]), jnp.asarray(counts[at]))
        if reference is None:
            nats = _nats(head.specs, head.tensors, *part)
            sums[0] += float(nats)
        else:
            found = _compare(
                (head.specs, reference.specs),
                head.tensors,
                reference.tensors,
                jnp.asarray(x0[row][at]),
                *part,
            )
            sums[:4] += np.asarray(found, np.float64)
    if reference is None:
        return sums[0] / counted, 0.0, 0.0, 0.0
    return sums[0] / counted, sums[1] / length, sums[2] / length, sums[3] / length


@functools.partial(jax.jit, static_argnums=0)
def _nats(specs, tensors, x, following, counts):
    return _cross_entropy(
        jax.nn.log_softmax(layers.logits(Weights(specs, tensors), x)), following, counts
    )


@functools.partial(jax.jit, static_argnums=0)
def _compare(specs, tensors, tensors0, x0, x, following, counts):
    """Sums over tokens: nats, KL, same best token, |difference| / |original| of hidden rows."""
    logits = layers.logits(Weights(specs[0], tensors), x)
    logits0 = layers.logits(Weights(specs[1], tensors0), x0)
    p, p0 = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits0)
    kl = jnp.maximum(jnp.sum(jnp.exp(p0) * (p0 - p), axis=-1), 0.0)
    same = jnp.argmax(p, -1) == jnp.argmax(p0, -1)
    if x.shape == x0.shape:
        size = jnp.maximum(jnp.linalg.norm(x0, axis=-1), 1e-30)
        error = jnp.sum(jnp.linalg.norm(x - x0, axis=-1) / size)
    else:
        error = jnp.full((), jnp.nan)
    return jnp.stack([_cross_entropy(p, following, counts), jnp.sum(kl), jnp.sum(same), error])


@functools.partial(jax.jit, static_argnums=0)
def _best(specs, tensors, x):
    return jnp.argmax(layers.logits(Weights(specs, tensors), x), axis=-1)


def _cross_entropy(log_probs, following, counts):
    picked = jnp.take_along_axis(log_probs, following[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(counts, picked, 0.0))
