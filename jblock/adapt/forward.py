"""A chain's maths without an engine: whole sequences at once, no cache, differentiable.

For measuring and training. The blocks are those the engine runs; only attention is written out, over
the tokens of the row itself.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import merging
from jblock.blocks import layout
from jblock.blocks.attention import Attention
from jblock.blocks.embedding import Embedding, Head
from jblock.blocks.ffn import Ffn
from jblock.blocks.moe import Mixture
from jblock.blocks.platform import Platform
from jblock.blocks.rows import Rows
from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    ExpertSpec,
    FfnSpec,
    NormSpec,
    RouterSpec,
    StitchSpec,
    UnembeddingSpec,
    unquantized,
)
from jblock.blocks.stitch import Stitch
from jblock.zoo.records import Step, ZooError
from jblock.zoo.store import Zoo

Tensors = Mapping[str, jax.Array]
# No form of the matmuls that is special to a device: projections lie [out, in], as they are stored.
_PLAIN = Platform("any", "")


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Steps of a chain with their weights in memory.

    Attributes:
      specs: one a step; of what few bits stand for, and with the biases that deltas bring.
      tensors: float32 (`load` may make matrices bfloat16), one dict a step, named as its spec has them and in
        the orientation they are stored in; deltas are merged into them.
    """

    specs: tuple[ComponentSpec, ...]
    tensors: tuple[Tensors, ...]

    def __post_init__(self):
        if len(self.specs) != len(self.tensors):
            raise ValueError(f"{len(self.specs)} specs and {len(self.tensors)} sets of tensors")

    def replaced(self, first: int, count: int, by: "Weights") -> "Weights":
        """With `by` in place of `count` steps from `first` on."""
        last = first + count
        return Weights(
            (*self.specs[:first], *by.specs, *self.specs[last:]),
            (*self.tensors[:first], *by.tensors, *self.tensors[last:]),
        )

    def part(self, first: int, last: int) -> "Weights":
        """Steps first to last - 1."""
        return Weights(self.specs[first:last], self.tensors[first:last])

    @property
    def num_params(self) -> int:
        """Scalars in all tensors; tied ones are counted at each place."""
        return sum(int(t.size) for tensors in self.tensors for t in tensors.values())


def load(zoo: Zoo, steps: Sequence[Step], dtype: str = "float32") -> Weights:
    """Reads steps of a zoo; components that occur twice are read once.

    Args:
      zoo: where they lie.
      steps: of a chain.
      dtype: of matrices; vectors are float32.

    Raises:
      ZooError: something is missing or damaged, or a delta of a kind that cannot be merged.
    """
    reason = merging.unmergeable(zoo, steps)
    if reason is not None:
        raise ZooError(reason)
    known: dict[tuple[str, tuple[str, ...]], tuple[ComponentSpec, Tensors]] = {}
    for step in steps:
        key = (step.component, step.deltas)
        if key not in known:
            record = zoo.component(step.component)
            spec = unquantized(record.spec)
            values = _floats(record.spec, zoo.load_component(step.component))
            for id_ in step.deltas:
                spec = merging.merge(spec, values, zoo.delta(id_).spec, zoo.load_delta(id_))
            tensors = {
                n: jnp.asarray(v.astype(dtype, copy=False) if v.ndim == 2 else v)
                for n, v in values.items()
            }
            known[key] = spec, tensors
    found = [known[step.component, step.deltas] for step in steps]
    return Weights(tuple(spec for spec, _ in found), tuple(tensors for _, tensors in found))


def _floats(spec: ComponentSpec, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in float32, those of few bits as the weights they stand for."""
    return {n: v.astype(np.float32) for n, v in layout.floats(spec, stored).items()}


def run(weights: Weights, x: jax.Array, first_layer: int = 0) -> jax.Array:
    """Takes hidden rows through layers and stitches.

    Args:
      weights: of steps between an embedding and a head.
      x: float32 [B, T, hidden_size]; every row of B starts at position 0.
      first_layer: attention layers below, which the position of a stitch depends on.

    Returns:
      float32 [B, T, hidden_size of the last].
    """
    batch, length, _ = x.shape
    rows = _rows(batch, length)
    x = rows.flat(x)
    stored: Any = zip(weights.specs, weights.tensors, strict=True)
    parts: list[Any] = [(spec, layout.to_compute(spec, tensors)) for spec, tensors in stored]
    source, depth = None, first_layer
    for at, (spec, tensors) in enumerate(parts):
        match spec:
            case AttentionSpec():
                block = Attention(spec, tensors, {})
                source = block.ffn_source(x, rows)
                x = block(x, rows, functools.partial(_attend, spec))
                depth += 1
            case FfnSpec():
                x = Ffn(spec, tensors, {})(x, rows, source)
            case RouterSpec():
                behind = parts[at + 1 : at + 1 + spec.followers]
                experts: Any = [(s, t, {}) for s, t in behind]
                x = Mixture(spec, tensors, {}, experts)(x, rows)
            case StitchSpec():
                position = jnp.asarray(spec.position(depth), jnp.int32)
                x = Stitch(spec, tensors)(x, position, rows)
            case ExpertSpec():
                pass  # ran with its router
            case _:
                raise ZooError(f"a {spec.kind} component is no layer")
    return rows.by_sequence(x)


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
    """int32 [B, T] -> float32 [B, T, hidden_size], by the first step."""
    spec = weights.specs[0]
    if not isinstance(spec, EmbeddingSpec):
        raise ValueError(f"a chain begins with an embedding, not with {spec.kind}")
    positions = _rows(*tokens.shape).positions
    embedding = Embedding(spec, weights.tensors[0], "float32")
    x = embedding(tokens.reshape(-1), positions.reshape(-1))
    return x.reshape(*tokens.shape, -1)


def head(weights: Weights, x: jax.Array) -> jax.Array:
    """float32 [B, T, hidden_size] -> logits float32 [B, T, vocab_size], by the last two steps."""
    norm, unembedding = weights.specs[-2:]
    if not isinstance(norm, NormSpec) or not isinstance(unembedding, UnembeddingSpec):
        raise ValueError(f"a chain ends with norm and unembedding, not {norm.kind}")
    tensors = (weights.tensors[-2], weights.tensors[-1])
    logits = Head((norm, unembedding), tensors, _PLAIN, tied=False)(x.reshape(-1, x.shape[-1]))
    return logits.reshape(*x.shape[:2], -1)


def hidden_and_logits(weights: Weights, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [B, T] -> last hidden rows before the final norm [B, T, d], logits [B, T, vocab_size]."""
    x = run(weights.part(1, len(weights.specs) - 2), embed(weights, tokens))
    return x, head(weights, x)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(specs: tuple[ComponentSpec, ...], tensors: tuple[Tensors, ...], tokens: jax.Array):
    return hidden_and_logits(Weights(specs, tensors), tokens)


def outputs(weights: Weights, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """`hidden_and_logits`, compiled once for chains of equal specs and batches of equal shape."""
    return _outputs(weights.specs, weights.tensors, jnp.asarray(tokens, jnp.int32))


def _rows(batch: int, length: int) -> Rows:
    return Rows(
        num_seqs=batch,
        q_len=length,
        starts=jnp.zeros(batch, jnp.int32),
        q_lens=jnp.full(batch, length, jnp.int32),
        slots=jnp.zeros(batch, jnp.int32),
        platform=_PLAIN,
    )


def _attend(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of [B, T, heads, d] over [B, T, kv_heads, d]."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, spec.num_kv_heads, heads // spec.num_kv_heads, dim)
    scale = spec.scale if spec.scale is not None else dim**-0.5
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision=exact) * scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    behind = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = behind >= 0
    if spec.sliding_window is not None:
        seen &= behind < spec.sliding_window
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=exact)
    return out.reshape(batch, length, heads, dim)
