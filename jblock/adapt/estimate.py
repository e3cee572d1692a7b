"""What measuring and training will take, before they begin: time and memory, to within a factor of two.

Products dominate. Their number follows from the shapes, and how fast they are from one product that is timed
on the spot.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import layers, metrics
from jblock.adapt.probe import ProbeData
from jblock.blocks.spec import ComponentSpec, ExpertSpec, RouterSpec, UnembeddingSpec, unquantized
from jblock.zoo.records import Step, ZooError
from jblock.zoo.store import Zoo

_SIZE = 1024  # of the product that is timed
_SHARE = 0.5  # of its speed that a layer reaches, with attention and norms
_RUNTIME_BYTES = 300 << 20  # programs, and what the allocator keeps
# What encoding a weight takes, in operations of a layer's products; `python -m bench adapt` measures both.
_OPERATIONS = {"low_rank": 16_000, "bits": 7 * 1_200, "quantize": 350}
_COMPILE_SECONDS = {"low_rank": 2.0, "bits": 1.0, "quantize": 0.1}  # for each shape of matrix
# Of a weight that is encoded: its own value, the base's, their difference, and what is tried.
_WEIGHT_BYTES = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a piece of work.

    Attributes:
      seconds: it takes.
      nbytes: of memory at most, beside the libraries.
    """

    seconds: float
    nbytes: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        if minutes > 90:
            long = f"{minutes / 60:.0f} hours"
        else:
            long = f"{minutes:.0f} minutes" if minutes > 1.5 else f"{max(1, self.seconds):.0f} s"
        return f"about {long} and {self.nbytes / 1e9:.1f} GB on {jax.default_backend()}"


def measuring(zoo: Zoo, steps: Sequence[Step], data: ProbeData, chains: int) -> Estimate:
    """Of putting `chains` chains of about these steps through a probe, beside the original."""
    sizes = Sizes.of(zoo, steps)
    tokens, answers = data.text.tokens.size, 0
    through = tokens
    if data.items is not None:
        through, answers = tokens + data.items.tokens.size, data.items.num_targets
    # Logits of the text twice: those of the original are computed again beside each.
    flops = 2 * sizes.active * through + 2 * sizes.head * (2 * tokens + answers)
    hidden = 4 * sizes.width * through
    held = max(2 * hidden, min((chains + 1) * hidden, metrics.LIVE_BYTES))
    return Estimate(
        seconds=(chains + 1) * flops / speed(), nbytes=sizes.in_memory() + held + _RUNTIME_BYTES
    )


def encoding(zoo: Zoo, components: Sequence[str], codecs: Sequence[str]) -> Estimate:
    """Of making few bits of some components, one after another.

    Args:
      zoo: has them.
      components: their ids.
      codecs: that are tried: "low_rank", "bits" or "quantize".
    """
    specs = [zoo.component(id_).spec for id_ in components]
    sizes = [scalars(spec) for spec in specs]
    shapes = {s for spec in specs for s in unquantized(spec).tensors().values() if len(s) == 2}
    compiling = len(shapes) * sum(_COMPILE_SECONDS[codec] for codec in codecs)
    operations = sum(_OPERATIONS[codec] for codec in codecs)
    return Estimate(
        seconds=compiling + operations * sum(sizes) / speed(),
        nbytes=_WEIGHT_BYTES * max(sizes, default=0) + _RUNTIME_BYTES,
    )


def training(
    zoo: Zoo, steps: Sequence[Step], above: int, trained: int, optimizer_steps: int, tokens: int
) -> Estimate:
    """Of gradient descent through the upper part of a chain.

    Args:
      zoo: has the chain.
      steps: of it.
      above: scalars of frozen layers above what is trained.
      trained: scalars that are trained.
      optimizer_steps: of the optimizer.
      tokens: of a step.
    """
    sizes = Sizes.of(zoo, steps)
    # Frozen layers run forward, forward again, and backward to their input; trained ones backward twice.
    flops = tokens * (6 * above + 8 * trained + 6 * sizes.head)
    count = len(layers.plan(zoo, steps).layers)
    kept = 4 * tokens * sizes.width * count + 16 * trained
    return Estimate(
        seconds=optimizer_steps * flops / speed(),
        nbytes=sizes.in_memory() + kept + 20 * tokens * sizes.vocabulary + _RUNTIME_BYTES,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a chain, in scalars.

    Attributes:
      active: of all layers that a token is multiplied by.
      largest: of its largest layer.
      head: of the unembedding.
      width: hidden size.
      vocabulary: its size.
    """

    active: int
    largest: int
    head: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, zoo: Zoo, steps: Sequence[Step]) -> "Sizes":
        """Those of a chain."""
        plan = layers.plan(zoo, steps)
        active = largest = 0
        for layer in plan.layers:
            specs = [zoo.component(s.component).spec for s in layer.steps]
            sizes = [scalars(spec) for spec in specs]
            largest = max(largest, sum(sizes))
            routers = [s for s in specs if isinstance(s, RouterSpec)]
            share = sum(r.top_k for r in routers) / max(1, sum(r.followers for r in routers))
            active += sum(
                int(n * share) if isinstance(s, ExpertSpec) else n
                for s, n in zip(specs, sizes, strict=True)
            )
        head = unquantized(zoo.component(plan.head[-1].component).spec)
        if not isinstance(head, UnembeddingSpec):
            raise ZooError(f"a chain ends with an unembedding, not with {head.kind}")
        return cls(
            active=active,
            largest=largest,
            head=head.vocab_size * head.hidden_size,
            width=head.hidden_size,
            vocabulary=head.vocab_size,
        )

    def in_memory(self) -> int:
        """Bytes of what is loaded at once: three layers, or the unembedding, as read and as computed with."""
        itemsize = np.dtype(layers.compute_dtype()).itemsize
        return max(3 * self.largest, 2 * self.head) * itemsize + metrics.logits_bytes(
            self.vocabulary
        )


@functools.cache
def speed() -> float:
    """Operations a second that a layer reaches here."""
    one = jnp.ones((_SIZE, _SIZE), layers.compute_dtype())
    product = jax.jit(lambda x: jnp.dot(x, one, preferred_element_type=jnp.float32).sum())
    product(one).block_until_ready()
    begin = time.perf_counter()
    for _ in range(3):
        product(one).block_until_ready()
    return _SHARE * 3 * 2 * _SIZE**3 / (time.perf_counter() - begin)


def scalars(spec: ComponentSpec) -> int:
    """In the tensors of a component, quantized or not."""
    return sum(int(np.prod(shape)) for shape in unquantized(spec).tensors().values())
