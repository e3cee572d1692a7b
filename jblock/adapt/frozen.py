"""The frozen upper part of a chain, that gradients pass on their way to what is trained below it.

Of each layer only the rows that go in are kept; on the way back it is computed again (gradient
checkpointing, Chen et al. 2016, arXiv 1604.06174). Layers stay in memory as far as they have room, the
others are read from the zoo on every pass. Logits are those of some rows at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import layers
from jblock.adapt.forward import Weights
from jblock.adapt.layers import Layer
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

_KEPT_BYTES = 256 << 20
_KEPT_LAYERS = 3
_HEAD_TOKENS = 256  # whose logits are in memory at once


class FrozenTop:
    """Layers and head of a chain, from one of its layers on."""

    def __init__(self, zoo: Zoo, above: Sequence[Layer], head: Sequence[Step]):
        """Reads the head, and as many layers as are kept."""
        self._zoo, self._layers = zoo, tuple(above)
        self._head = layers.load(zoo, head)
        self._kept: list[Weights] = []
        used = 0
        for layer in self._layers:
            weights = layers.load(zoo, layer.steps)
            used += sum(t.nbytes for tensors in weights.tensors for t in tensors.values())
            if used > _KEPT_BYTES and len(self._kept) >= _KEPT_LAYERS:
                break
            self._kept.append(weights)

    def forward(self, x: jax.Array, skip: int = 0, shift: int = 0) -> list[jax.Array]:
        """Rows [B, T, d] that go into each layer, then those that come out of the last.

        Args:
          x: goes in.
          skip: so many of the lowest layers are left out.
          shift: more attention layers lie below than in the layers' own chain, which stitches are told.
        """
        rows = [x]
        for i, weights in self._each(range(skip, len(self._layers))):
            rows.append(layers.through(weights, rows[-1], self._layers[i].depth + shift))
        return rows

    def backward(
        self, rows: Sequence[jax.Array], gradient: jax.Array, skip: int = 0, shift: int = 0
    ) -> jax.Array:
        """The gradient with respect to the first of the rows of `forward`, from that of the last."""
        for i, weights in self._each(range(len(self._layers) - 1, skip - 1, -1)):
            depth = self._layers[i].depth + shift
            gradient = layers.back(weights, rows[i - skip], depth, gradient)
        return gradient

    def loss(
        self,
        x: jax.Array,
        tokens: np.ndarray,
        target: np.ndarray,
        text_share: float,
        teacher: "tuple[FrozenTop, np.ndarray] | None" = None,
    ) -> tuple[float, jax.Array]:
        """`text_share` of the cross entropy of the tokens that count, and the rest of the KL divergence from
        a teacher's next tokens, both means over tokens; and the gradient with respect to `x`.

        Args:
          x: [B, T, d] behind the last layer.
          tokens: int32 [B, T].
          target: bool [B, T].
          text_share: between 0 and 1; 1 needs no teacher.
          teacher: what has the teacher's head, and its last rows [B, T, d].
        """
        count, length = tokens.shape
        size = max(1, min(count, _HEAD_TOKENS // length))
        total = np.float32(max(1, target[:, 1:].sum()))
        head = None if teacher is None else teacher[0]._head
        form = (self._head.specs, None if head is None else head.specs, text_share)
        value, gradients = 0.0, []
        for begin in range(0, count, size):
            at = np.arange(begin, begin + size) % count
            counts = target[at] & (np.arange(begin, begin + size) < count)[:, None]
            taught = None if teacher is None else jnp.asarray(teacher[1][at])
            loss, gradient = _head_loss(
                form,
                self._head.tensors,
                None if head is None else head.tensors,
                x[at],
                taught,
                jnp.asarray(tokens[at]),
                jnp.asarray(counts),
                total,
            )
            value += float(loss)
            gradients.append(gradient)
        return value, jnp.concatenate(gradients)[:count]

    def _each(self, order: range):
        """(index, weights) of layers in an order; those that are not kept are read, one ahead."""
        missing = [i for i in order if i >= len(self._kept)]
        read = layers.loaded(self._zoo, [self._layers[i].steps for i in missing])
        for i in order:
            yield i, self._kept[i] if i < len(self._kept) else next(read)


def pull(
    run: Callable[[Any, Any], jax.Array],
) -> Callable[[Any, Any, jax.Array], Any]:
    """For a function (trained, x) -> rows: (trained, x, gradient of the rows) -> gradient of `trained`."""

    @jax.jit
    def gradients(trained: Any, x: Any, gradient: jax.Array) -> Any:
        _, back = jax.vjp(lambda t: run(t, x), trained)
        return back(gradient)[0]

    return gradients


@functools.partial(jax.jit, static_argnums=0)
def _head_loss(form, tensors, taught_tensors, x, taught, tokens, counts, total):
    specs, taught_specs, text_share = form

    def loss(x):
        logits = layers.logits(Weights(specs, tensors), x[:, :-1])
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        each = -text_share * picked
        if taught_specs is not None:
            p = jax.nn.log_softmax(
                layers.logits(Weights(taught_specs, taught_tensors), taught[:, :-1])
            )
            each += (1 - text_share) * jnp.sum(jnp.exp(p) * (p - log_probs), axis=-1)
        return jnp.sum(jnp.where(counts[:, 1:], each, 0.0)) / total

    return jax.value_and_grad(loss)(x)
