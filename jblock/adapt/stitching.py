"""Stitches: the lower layers of one model under the upper layers of another, joined by a trained component.

Both models stay as they are, so a stitched chain costs the stitch alone. One stitch serves several joins:
it is told how many layers lie below it (StitchSpec), and is trained on all of them in turn.
After arXiv 2404.18322, section 4.2; the linear part of the start is model stitching as in arXiv 2106.07682,
its random features are an extreme learning machine (Huang et al. 2006).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.adapt import forward, layers, training
from jblock.adapt.forward import Weights
from jblock.adapt.frozen import FrozenTop, pull
from jblock.adapt.probe import Rows
from jblock.blocks.spec import StitchSpec
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.store import Zoo

_START_TOKENS = 32768
_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Join:
    """`lower` layers of the one model, then the other's from its layer `upper` on."""

    lower: int
    upper: int


def layer_starts(zoo: Zoo, chain: Chain) -> list[int]:
    """Index of the first step of every layer of a chain, then that of its head."""
    kinds = [zoo.component(step.component).spec.kind for step in chain.steps]
    return [*(i for i, kind in enumerate(kinds) if kind == "attention"), len(kinds) - 2]


def check(zoo: Zoo, lower: Chain, upper: Chain, joins: Sequence[Join]) -> None:
    """Whether two models can be joined so.

    Raises:
      ZooError: they have other tokens, or not so many layers, or a depth is joined twice.
    """
    if lower.tokenizer != upper.tokenizer or lower.vocab_size != upper.vocab_size:
        raise ZooError(f"{lower.name} and {upper.name} have other tokenizers: no stitch can help")
    counts = [len(layer_starts(zoo, chain)) - 1 for chain in (lower, upper)]
    for join in joins:
        if not 1 <= join.lower <= counts[0] or not 0 <= join.upper < counts[1]:
            raise ZooError(
                f"join {join.lower}:{join.upper}: give 1 to {counts[0]} layers of {lower.name} and a "
                f"layer 0 to {counts[1] - 1} of {upper.name}"
            )
    depths = [join.lower for join in joins]
    if not joins or len(set(depths)) < len(depths):
        raise ZooError(f"joins {depths}: give each number of lower layers once")


def steps(zoo: Zoo, lower: Chain, upper: Chain, join: Join, stitch: Step) -> tuple[Step, ...]:
    """The steps of a stitched chain."""
    first = layer_starts(zoo, lower)[join.lower]
    last = layer_starts(zoo, upper)[join.upper]
    return (*lower.steps[:first], stitch, *upper.steps[last:])


def train(
    zoo: Zoo,
    lower: Chain,
    upper: Chain,
    joins: Sequence[Join],
    teacher: Chain,
    data: Rows,
    schedule: training.Schedule,
    inner_size: int,
    on_step: Callable[[int, float], object] = lambda step, value: None,
) -> tuple[StitchSpec, dict[str, jax.Array], str]:
    """Trains one stitch for all joins, which take turns.

    It starts where it gives, as well as least squares can, the rows that the upper layers had in their own
    model; then it learns end to end, half from the text itself and half from what a whole model makes of it.
    What is frozen and below it runs once over the data, so a step is the stitch and the layers above.

    Returns:
      Its spec, its tensors in float32, and the key of the work, for `training_state.remove`.

    Raises:
      ZooError: models that cannot be joined so, or a loss that is no number any more.
    """
    check(zoo, lower, upper, joins)
    joins = sorted(joins)
    plans = [layers.plan(zoo, chain.steps) for chain in (lower, upper, teacher)]
    starts = [layer_starts(zoo, chain) for chain in (lower, upper)]
    ends = [plans[0].before(starts[0][j.lower]) for j in joins]
    cuts = [plans[1].before(starts[1][j.upper]) for j in joins]
    spec = StitchSpec(
        hidden_size=zoo.component(lower.steps[0].component).spec.hidden_size,
        output_size=zoo.component(upper.steps[0].component).spec.hidden_size,
        inner_size=inner_size,
        depths=tuple(j.lower for j in joins),
        norm_eps=1e-5,
    )
    taught = zoo.component(teacher.steps[0].component).spec.hidden_size
    work = training.key(
        [dataclasses.astuple(j) for j in joins],
        [[[s.component, *s.deltas] for s in c.steps] for c in (lower, upper, teacher)],
        [dataclasses.asdict(schedule), inner_size, "stitch"],
        data,
    )
    data = training.some(data, schedule, len(joins) * spec.hidden_size + taught)
    last = len(plans[2].layers)
    if teacher.steps == lower.steps:
        *known, wanted = layers.rows_behind(zoo, lower.steps, [*ends, last], data.tokens)
    else:
        known = layers.rows_behind(zoo, lower.steps, ends, data.tokens)
        (wanted,) = layers.rows_behind(zoo, teacher.steps, [last], data.tokens)
    start = _start(zoo, spec, upper, cuts, data.tokens, known, schedule.seed)
    lowest = min(cuts)
    top = FrozenTop(zoo, plans[1].layers[lowest:], plans[1].head)
    teaches = FrozenTop(zoo, (), plans[2].head)
    runs = [functools.partial(_stitched, spec, j.lower) for j in joins]
    pulls = [pull(run) for run in runs]

    def gradients(trained: Any, step: int) -> tuple[float, Any]:
        form = step % len(joins)
        at = training.places(data, schedule, step)
        x = jnp.asarray(known[form][at])
        where = (cuts[form] - lowest, joins[form].lower - joins[form].upper)
        rows = top.forward(runs[form](trained, x), *where)
        taught = (teaches, wanted[at])
        value, gradient = top.loss(rows[-1], data.tokens[at], data.target[at], 0.5, taught)
        return value, pulls[form](trained, x, top.backward(rows, gradient, *where))

    return spec, training.fit(work, gradients, start, schedule, on_step), work


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stitched(spec, depth: int, trained, x):
    return forward.run(Weights((spec,), (trained,)), x, first_layer=depth)


def _start(
    zoo: Zoo,
    spec: StitchSpec,
    upper: Chain,
    cuts: Sequence[int],
    tokens: np.ndarray,
    known: Sequence[np.ndarray],
    seed: int,
) -> dict[str, jax.Array]:
    """The best map, by ridge regression, from the rows below to those the upper layers had: of the rows
    themselves and of random features of them, whose `up` stays as it is drawn."""
    rng = np.random.default_rng(seed)
    shapes = spec.tensors()
    count = min(len(tokens), max(2, _START_TOKENS // tokens.shape[1]))
    at = np.sort(rng.choice(len(tokens), count, replace=False))
    targets = layers.rows_behind(zoo, upper.steps, cuts, tokens[at])
    up = rng.standard_normal(shapes["up.weight"], np.float32) * spec.hidden_size**-0.5
    means, xs, ys = [], [], []
    for rows, target in zip(known, targets, strict=True):
        # The first position, which sees nothing, is unlike all others.
        x, y = (v[:, 1:].reshape(-1, v.shape[-1]) for v in (rows[at], target))
        inner = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + spec.norm_eps) @ up.T
        x = np.concatenate([x, inner / (1 + np.exp(-inner))], axis=1)
        means.append((x.mean(0), y.mean(0)))
        xs.append(x - means[-1][0])
        ys.append(y - means[-1][1])
    x, y = np.concatenate(xs), np.concatenate(ys)
    size = x.std(0) + 1e-6
    x /= size
    square = (x.T @ x).astype(np.float64) + _RIDGE * len(x) * np.eye(x.shape[1])
    found = np.linalg.solve(square, x.T @ y).T / size
    start = {
        "position.gain": np.ones(shapes["position.gain"]),
        "position.bias": np.stack([m_y - found @ m_x for m_x, m_y in means]),
        "proj.weight": found[:, : spec.hidden_size],
        "norm.weight": np.ones(shapes["norm.weight"]),
        "up.weight": up,
        "down.weight": found[:, spec.hidden_size :],
    }
    return {n: jnp.asarray(v, jnp.float32) for n, v in start.items()}
