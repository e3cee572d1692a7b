"""Gradient descent on a few tensors between frozen ones: seeded, and gone on with after a kill.

Adam (arXiv 1412.6980) with a warm-up, a cosine decay and clipping. Batches depend on the seed and the
number of the step alone, so a run that was interrupted ends with the same weights as one that was not.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import training_state
from jblock.adapt.probe import Rows
from jblock.blocks.spec_json import canonical_json
from jblock.zoo.records import ZooError

Tree = Any
_SAVE_SECONDS = 15.0
_KNOWN_BYTES = 512 << 20  # for hidden rows that are computed once
_TURNS = 3
_WARM_UP = 0.05
_CLIP = 1.0
_B1, _B2, _EPS = 0.9, 0.98, 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
      steps: of the optimizer.
      learning_rate: the largest.
      batch_tokens: about how many a step, padding included.
      seed: of the start and of the order of the data.
    """

    steps: int
    learning_rate: float
    batch_tokens: int
    seed: int

    def __post_init__(self):
        if self.steps < 1 or self.batch_tokens < 1 or not 0 < self.learning_rate < 1:
            raise ZooError(f"{self}: steps and batch_tokens are at least 1, 0 < learning_rate < 1")


def batch(data: Sequence[Rows], schedule: Schedule, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and target of one step, both [B, T]: the data sets take turns."""
    rows = data[step % len(data)]
    at = places(rows, schedule, step)
    return rows.tokens[at], rows.target[at]


def some(data: Rows, schedule: Schedule, width: int) -> Rows:
    """As many rows of a data set as training comes to some times, and as `_KNOWN_BYTES` hold `width` numbers
    a token of: what is frozen and lies below runs over these once."""
    length = data.tokens.shape[1]
    used = schedule.steps * schedule.batch_tokens // _TURNS
    most = min(_KNOWN_BYTES // (4 * width), used) // length
    if len(data) <= most:
        return data
    rng = np.random.default_rng([schedule.seed, len(data)])
    at = np.sort(rng.choice(len(data), max(2, most), replace=False))
    return Rows(data.tokens[at], data.target[at])


def places(rows: Rows, schedule: Schedule, step: int) -> np.ndarray:
    """Which rows of a data set one step draws: int64 [B], ascending."""
    count = min(len(rows), max(1, schedule.batch_tokens // rows.tokens.shape[1]))
    rng = np.random.default_rng([schedule.seed, step])
    return np.sort(rng.choice(len(rows), count, replace=False))


def key(*parts: Any) -> str:
    """64 hexadecimal digits that stand for a piece of training: settings as JSON, and data."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Rows):
            digest.update(np.ascontiguousarray(part.tokens, "<i4").tobytes())
            digest.update(np.packbits(part.target).tobytes())
        else:
            digest.update(canonical_json(part).encode())
    return digest.hexdigest()


def fit(
    work: str,
    gradients: Callable[[Tree, int], tuple[float | jax.Array, Tree]],
    trained: Tree,
    schedule: Schedule,
    on_step: Callable[[int, float], object] = lambda step, value: None,
) -> Tree:
    """Minimizes a loss; returns the trained tensors.

    Args:
      work: `key` of all that decides the result; the state of a run that is not done is kept under it
        (training_state.py).
      gradients: (trained, step) -> loss and its gradient; the step alone decides what is drawn.
      trained: where they begin; float32 arrays.
      schedule: how long and how fast.
      on_step: called with the number of steps done and the loss of the last.

    Raises:
      ZooError: the loss is no number any more, or its state cannot be written.
    """
    zeros = jax.tree.map(jnp.zeros_like, trained)
    state = (trained, zeros, zeros)
    done, state = _resume(work, state)
    saved = time.monotonic()
    for step in range(done, schedule.steps):
        scale = np.float32(_rate(step, schedule.steps))
        value, gradient = gradients(state[0], step)
        number = float(value)
        if not np.isfinite(number):
            raise ZooError(f"step {step}: the loss is {number}: give a smaller learning rate")
        state = _update(schedule.learning_rate, state, gradient, scale, np.float32(step + 1))
        on_step(step + 1, number)
        if time.monotonic() - saved > _SAVE_SECONDS:
            _save(work, step + 1, state)
            saved = time.monotonic()
    return state[0]


@functools.partial(jax.jit, static_argnums=0)
def _update(rate, state, gradient, scale, step):
    trained, first, second = state
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, _CLIP / (norm + 1e-12)), gradient)
    first = jax.tree.map(lambda m, g: _B1 * m + (1 - _B1) * g, first, gradient)
    second = jax.tree.map(lambda v, g: _B2 * v + (1 - _B2) * g * g, second, gradient)
    m_scale, v_scale = 1 / (1 - _B1**step), 1 / (1 - _B2**step)

    def moved(p, m, v):
        return p - rate * scale * m * m_scale / (jnp.sqrt(v * v_scale) + _EPS)

    return jax.tree.map(moved, trained, first, second), first, second


def _rate(step: int, steps: int) -> float:
    warm = max(1.0, _WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1.0, steps - warm))))


def _save(work: str, done: int, state: Tree) -> None:
    training_state.write(work, done, [np.asarray(a) for a in jax.tree.leaves(state)])


def _resume(work: str, state: Tree) -> tuple[int, Tree]:
    """What an earlier run left; a start from step 0 where there is none or it is damaged."""
    leaves, tree = jax.tree.flatten(state)
    found = training_state.read(work, [a.shape for a in leaves])
    if found is None:
        return 0, state
    return found[0], jax.tree.unflatten(tree, [jnp.asarray(a) for a in found[1]])


def cross_entropy(logits: jax.Array, tokens: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross entropy of the tokens that count. [B, T, V], [B, T], [B, T] -> []."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    counts = target[:, 1:]
    return -jnp.sum(jnp.where(counts, picked[..., 0], 0.0)) / jnp.sum(counts)


def stored(tensors: Mapping[str, jax.Array], dtype: str) -> dict[str, np.ndarray]:
    """Trained tensors as they are put into the zoo."""
    return {n: np.asarray(jnp.asarray(v).astype(dtype)) for n, v in tensors.items()}
