"""A chain layer by layer, read from the zoo when each is needed.

So a model is measured, and trained through, with a few layers of it in memory: the one that computes, and
the next one, which a thread reads meanwhile. Projections are bfloat16 on an accelerator and float32 on a
CPU, where bfloat16 products are slower; sums and hidden rows are float32 on both (`blocks.linear.matmul`).
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import forward
from jblock.adapt.forward import Tensors, Weights
from jblock.blocks.spec import AttentionSpec, ComponentSpec, StitchSpec
from jblock.zoo.records import Step, ZooError
from jblock.zoo.store import Zoo

_BATCH_TOKENS = 2048  # put through a layer at once


def compute_dtype() -> str:
    """What projections are multiplied in on the device that jax uses here."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention and what follows it up to the next one, or a stitch.

    Attributes:
      steps: of the chain.
      depth: attention layers below, which the position of a stitch depends on.
    """

    steps: tuple[Step, ...]
    depth: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A chain, cut into what is in memory at once.

    Attributes:
      embedding: its first step.
      layers: in order.
      head: norm and unembedding.
    """

    embedding: tuple[Step, ...]
    layers: tuple[Layer, ...]
    head: tuple[Step, ...]

    def before(self, step: int) -> int:
        """How many layers lie before a step of the chain."""
        count, at = 0, len(self.embedding)
        while at < step:
            at += len(self.layers[count].steps)
            count += 1
        return count


def plan(zoo: Zoo, steps: Sequence[Step]) -> Plan:
    """Cuts a chain.

    Raises:
      ZooError: it has no embedding, layer and head, or a record is damaged.
    """
    if len(steps) < 4:
        raise ZooError(f"a chain of {len(steps)} components computes nothing: it has no layer")
    found: list[list[Step]] = []
    depths: list[int] = []
    depth = 0
    for step in steps[1:-2]:
        spec = zoo.component(step.component).spec
        if isinstance(spec, AttentionSpec | StitchSpec) or not found:
            found.append([])
            depths.append(depth)
        found[-1].append(step)
        depth += isinstance(spec, AttentionSpec)
    layers = tuple(Layer(tuple(s), d) for s, d in zip(found, depths, strict=True))
    return Plan(tuple(steps[:1]), layers, tuple(steps[-2:]))


def load(zoo: Zoo, steps: Sequence[Step]) -> Weights:
    """Steps as they are computed with, on the device.

    Raises:
      ZooError: something is missing or damaged, or a delta of a kind that cannot be merged.
    """
    return forward.load(zoo, steps, compute_dtype())


def loaded(zoo: Zoo, parts: Sequence[tuple[Step, ...]]) -> Iterator[Weights]:
    """Some runs of steps in order; while the caller computes with one, a thread reads the next."""
    if not parts:
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, zoo, parts[0])
        for later in (*parts[1:], None):
            weights = ahead.result()
            if later is not None:
                ahead = pool.submit(load, zoo, later)
            yield weights
            del weights


def embed(weights: Weights, tokens: np.ndarray) -> jax.Array:
    """int32 [B, T] -> float32 [B, T, d]."""
    return _embed(weights.specs, weights.tensors, jnp.asarray(tokens, jnp.int32))


def through(weights: Weights, x: jax.Array, depth: int) -> jax.Array:
    """Hidden rows float32 [B, T, d] through one layer; layers of equal specs share a program."""
    return _through(weights.specs, _static_depth(weights.specs, depth), weights.tensors, x)


def back(weights: Weights, x: jax.Array, depth: int, gradient: jax.Array) -> jax.Array:
    """The gradient with respect to the rows `x` that went into a layer, from that of what came out. The
    layer is computed again, so that only its input has to be kept."""
    return _back(weights.specs, _static_depth(weights.specs, depth), weights.tensors, x, gradient)


def logits(weights: Weights, x: jax.Array) -> jax.Array:
    """float32 [..., d] -> float32 [..., vocab_size], by norm and unembedding."""
    return _logits(weights.specs, weights.tensors, x)


def _static_depth(specs: tuple[ComponentSpec, ...], depth: int) -> int:
    return depth if any(isinstance(s, StitchSpec) for s in specs) else 0


@functools.partial(jax.jit, static_argnums=0)
def _embed(specs, tensors: tuple[Tensors, ...], tokens):
    return forward.embed(Weights(specs, tensors), tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _through(specs, depth: int, tensors: tuple[Tensors, ...], x):
    return forward.run(Weights(specs, tensors), x, depth)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _back(specs, depth: int, tensors: tuple[Tensors, ...], x, gradient):
    _, pull = jax.vjp(lambda x: forward.run(Weights(specs, tensors), x, depth), x)
    return pull(gradient)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(specs, tensors: tuple[Tensors, ...], x):
    return forward.head(Weights(specs, tensors), x.reshape(1, -1, x.shape[-1])).reshape(
        *x.shape[:-1], -1
    )


def rows_behind(
    zoo: Zoo, steps: Sequence[Step], counts: Sequence[int], tokens: np.ndarray
) -> list[np.ndarray]:
    """Hidden rows of a chain, float32 [B, T, d], behind its first `count` layers, for each of `counts`."""
    cut = plan(zoo, steps)
    size = max(1, min(len(tokens), _BATCH_TOKENS // tokens.shape[1]))
    # All batches of one size, so that one program serves; the last is filled up.
    at = [np.arange(b, b + size) % len(tokens) for b in range(0, len(tokens), size)]
    weights = load(zoo, cut.embedding)
    rows = [embed(weights, tokens[i]) for i in at]
    del weights
    found: dict[int, np.ndarray] = {}

    def keep(count: int) -> None:
        if count in counts:
            found[count] = np.concatenate([np.asarray(x) for x in rows])[: len(tokens)]

    keep(0)
    wanted = cut.layers[: max(counts)]
    for count, (layer, weights) in enumerate(
        zip(wanted, loaded(zoo, [layer.steps for layer in wanted]), strict=True), 1
    ):
        rows = [through(weights, x, layer.depth) for x in rows]
        keep(count)
    return [found[count] for count in counts]
