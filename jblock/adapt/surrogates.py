"""Surrogates: smaller components that do about what those of some layers do.

The least important heads and feed-forward channels are removed, by the first-order Taylor criterion
(arXiv 1906.10771): what the loss would change if one were scaled down. What is left is trained to give the
chain's own outputs and hidden rows, with all other components frozen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import forward, layers, training
from jblock.adapt.forward import Weights
from jblock.adapt.frozen import FrozenTop, pull
from jblock.adapt.probe import Rows
from jblock.blocks import layout
from jblock.blocks.spec import AttentionSpec, ComponentSpec, FfnSpec
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.store import Zoo

_RANKING_BATCHES = 8
_MULTIPLE = 8  # of channels, so that matmuls stay of a size machines like


def smaller(specs: Sequence[ComponentSpec], keep: float) -> list[ComponentSpec]:
    """Specs of attention and ffn components with at most `keep` of their parameters, projections apart.

    Every group of query heads keeps as many heads as fit its share; channels take what is left.

    Raises:
      ZooError: other components, or so few parameters that nothing would be left.
    """
    if not 0 < keep < 1:
        raise ZooError(f"keep {keep}: give a share of the parameters between 0 and 1")
    attentions, ffns = [], []
    for spec in specs:
        if isinstance(spec, AttentionSpec):
            attentions.append(spec)
        elif isinstance(spec, FfnSpec):
            ffns.append(spec)
        else:
            raise ZooError(f"a {spec.kind} component has no surrogate: give layers without experts")
    budget = keep * sum(_size(spec) for spec in specs)
    share = keep
    while True:
        found: dict[ComponentSpec, ComponentSpec] = {}
        for spec in attentions:
            group = spec.num_heads // spec.num_kv_heads
            heads = max(1, round(share * group)) * spec.num_kv_heads
            found[spec] = dataclasses.replace(spec, num_heads=heads, qkv="apart", transposed=False)
        used = sum(_size(found[s]) for s in specs if s in found)
        one = sum(_size(_narrow(s, _MULTIPLE)) for s in ffns)
        if not ffns and used <= budget:
            return [found[s] for s in specs]
        if ffns and used + one <= budget:
            break
        if share == 0.0:
            raise ZooError(f"keep {keep}: not even one head a group and {_MULTIPLE} channels fit")
        share = max(0.0, share - 0.1)
    for width in range(min(s.intermediate_size for s in ffns) // _MULTIPLE, 0, -1):
        narrow: dict[ComponentSpec, FfnSpec] = {s: _narrow(s, width * _MULTIPLE) for s in ffns}
        if used + sum(_size(narrow[s]) for s in ffns) <= budget:
            return [found[s] if s in found else narrow[s] for s in specs]
    raise ZooError(f"keep {keep}: nothing would be left of the feed-forward layers")


def prune(
    spec: ComponentSpec,
    small: ComponentSpec,
    tensors: Mapping[str, jax.Array],
    importance: np.ndarray,
) -> dict[str, jax.Array]:
    """The tensors of `small`: the parts of a component that are most important.

    Args:
      spec: of the component.
      small: of what is left, from `smaller`.
      tensors: as stored.
      importance: float [num_heads] or [intermediate_size].
    """
    values = {n: jnp.asarray(v) for n, v in layout.to_compute(spec, tensors).items()}  # type: ignore[arg-type]
    if isinstance(spec, AttentionSpec) and isinstance(small, AttentionSpec):
        groups = importance.reshape(spec.num_kv_heads, -1)
        kept = np.sort(np.argsort(-groups, axis=1)[:, : small.num_heads // spec.num_kv_heads])
        heads = (kept + np.arange(len(kept))[:, None] * groups.shape[1]).reshape(-1)
        rows = (heads[:, None] * spec.head_dim + np.arange(spec.head_dim)).reshape(-1)
        out = {"q.weight": 0, "q.bias": 0, "o.weight": 1}
        if spec.qk_norm_joint:
            out |= {"q_norm.weight": 0, "q_norm.bias": 0}
    elif isinstance(spec, FfnSpec) and isinstance(small, FfnSpec):
        rows = np.sort(np.argsort(-importance)[: small.intermediate_size])
        out = {f"{p}.{t}": 0 for p in ("gate", "up") for t in ("weight", "bias")}
        out["down.weight"] = 1
    else:
        raise ZooError(f"a {spec.kind} component has no surrogate")
    return {n: jnp.take(v, rows, axis=out[n]) if n in out else v for n, v in values.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Surrogate:
    """What was made for some steps.

    Attributes:
      first: index of the first step it stands for.
      specs: one a step.
      tensors: float32, one dict a step.
      params: scalars of it, and of what it stands for.
      work: key of the training, for `training_state.remove`.
    """

    first: int
    specs: tuple[ComponentSpec, ...]
    tensors: tuple[dict[str, jax.Array], ...]
    params: tuple[int, int]
    work: str


def train(
    zoo: Zoo,
    chain: Chain,
    first: int,
    last: int,
    keep: float,
    data: Sequence[Rows],
    schedule: training.Schedule,
    on_step: Callable[[int, float], object] = lambda step, value: None,
) -> Surrogate:
    """Prunes steps first to last - 1 of a chain and distils what is left.

    Raises:
      ZooError: steps that have no surrogate, or a loss that is no number any more.
    """
    plan = layers.plan(zoo, chain.steps)
    bottom, behind = plan.before(first), plan.before(last)
    part = forward.load(zoo, chain.steps[first:last])
    specs = tuple(smaller(part.specs, keep))
    work = training.key(
        [[s.component, *s.deltas] for s in chain.steps],
        [dataclasses.asdict(schedule), first, last, keep, "surrogate"],
        *data,
    )
    width = 3 * zoo.component(chain.steps[0].component).spec.hidden_size * len(data)
    sets = [_Set.of(zoo, chain, (bottom, behind), training.some(r, schedule, width)) for r in data]
    top = FrozenTop(zoo, plan.layers[behind:], plan.head)
    depth = plan.layers[bottom].depth
    ranks = _importances(part, depth, top, sets, schedule)
    parts = zip(part.specs, specs, part.tensors, ranks, strict=True)
    start = tuple(prune(spec, small, tensors, rank) for spec, small, tensors, rank in parts)
    run = jax.jit(lambda trained, x: forward.run(Weights(specs, trained), x, depth))
    back = pull(run)

    def gradients(trained: Any, step: int) -> tuple[float, Any]:
        x, wanted, taught, tokens, target = sets[step % len(sets)].draw(schedule, step)
        got = run(trained, x)
        rows = top.forward(got)
        value, gradient = top.loss(rows[-1], tokens, target, 0.0, (top, taught))
        near, apart = _near(got, wanted, jnp.asarray(target))
        return value + float(near), back(trained, x, top.backward(rows, gradient) + apart)

    tensors = training.fit(work, gradients, start, schedule, on_step)
    sizes = (Weights(specs, tensors).num_params, part.num_params)
    return Surrogate(first, specs, tensors, sizes, work)


@dataclasses.dataclass(frozen=True, eq=False)
class _Set:
    """Rows to train on, with what the chain makes of them, which is computed once.

    Attributes:
      rows: tokens and target.
      below: float32 [B, T, d] that go into the first layer that is replaced.
      behind: that come out of the last.
      last: behind all layers.
    """

    rows: Rows
    below: np.ndarray
    behind: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, zoo: Zoo, chain: Chain, at: tuple[int, int], rows: Rows) -> "_Set":
        """Of a chain whose layers at[0] to at[1] - 1 are replaced."""
        end = len(layers.plan(zoo, chain.steps).layers)
        return cls(rows, *layers.rows_behind(zoo, chain.steps, [*at, end], rows.tokens))

    def draw(self, schedule: training.Schedule, step: int):
        """below, behind, last, tokens and target of the rows that one step draws."""
        at = training.places(self.rows, schedule, step)
        below, behind = jnp.asarray(self.below[at]), jnp.asarray(self.behind[at])
        return below, behind, self.last[at], self.rows.tokens[at], self.rows.target[at]


@jax.jit
def _near(got: jax.Array, wanted: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared distance of hidden rows over their squared size, mean over all but padding; its gradient."""
    real = jnp.cumsum(target[:, ::-1], axis=1)[:, ::-1] > 0

    def distance(got):
        apart = jnp.sum((got - wanted) ** 2, axis=-1) / jnp.sum(wanted**2, axis=-1)
        return jnp.sum(jnp.where(real, apart, 0.0)) / jnp.sum(real)

    return jax.value_and_grad(distance)(got)


def _importances(
    part: Weights,
    depth: int,
    top: FrozenTop,
    sets: Sequence[_Set],
    schedule: training.Schedule,
) -> list[np.ndarray]:
    """For each step the importance of its heads or channels."""
    outs = [_out(spec) for spec in part.specs]

    def run(matrices: Any, rest: Any) -> jax.Array:
        x, stored = rest
        new = tuple(
            {**tensors, name: matrix}
            for tensors, (name, _), matrix in zip(stored, outs, matrices, strict=True)
        )
        return forward.run(Weights(part.specs, new), x, depth)

    back = pull(run)
    matrices = tuple(t[name] for t, (name, _) in zip(part.tensors, outs, strict=True))
    totals: list[Any] = [0.0] * len(outs)
    for step in range(_RANKING_BATCHES):
        x, behind, _, tokens, target = sets[step % len(sets)].draw(schedule, step)
        rows = top.forward(behind)
        _, gradient = top.loss(rows[-1], tokens, target, 1.0)
        found = back(matrices, (x, part.tensors), top.backward(rows, gradient))
        for i, (spec, (_, transposed)) in enumerate(zip(part.specs, outs, strict=True)):
            product = np.asarray(matrices[i] * found[i])
            by_input = product.sum(axis=1 if transposed else 0)
            if isinstance(spec, AttentionSpec):
                by_input = by_input.reshape(spec.num_heads, spec.head_dim).sum(axis=1)
            totals[i] = totals[i] + np.abs(by_input)
    return totals


def _out(spec: ComponentSpec) -> tuple[str, bool]:
    """The matrix whose inputs are heads or channels, and whether it is stored [in, out]."""
    name = "o.weight" if isinstance(spec, AttentionSpec) else "down.weight"
    return name, getattr(spec, "transposed", False)


def _narrow(spec: FfnSpec, width: int) -> FfnSpec:
    return dataclasses.replace(spec, intermediate_size=width, joined=False, transposed=False)


def _size(spec: ComponentSpec) -> int:
    return sum(int(np.prod(shape)) for shape in spec.tensors().values())
