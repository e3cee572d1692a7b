"""Stitches: the lower layers of one model under the upper layers of another, joined by a trained component.

Both models stay as they are, so a stitched chain costs the stitch alone. One stitch serves several joins:
it is told how many layers lie below it (StitchSpec), and is trained on all of them in turn.
After arXiv 2404.18322, section 4.2; the linear start is model stitching as in arXiv 2106.07682.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.spec import StitchSpec
from jblock.zoo import forward, training
from jblock.zoo.forward import Weights
from jblock.zoo.probe import Rows
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.store import Zoo

MATCHING = 4
"""Steps of matching rows to one step end to end."""
_START_TOKENS = 8192
_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Join:
    """`lower` layers of the one model, then the other's from its layer `upper` on."""

    lower: int
    upper: int


def layers(zoo: Zoo, chain: Chain) -> list[int]:
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
    counts = [len(layers(zoo, chain)) - 1 for chain in (lower, upper)]
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
    first, last = layers(zoo, lower)[join.lower], layers(zoo, upper)[join.upper]
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
    """Trains one stitch for all joins.

    First, MATCHING times as many steps, which are cheap, to give the rows that the upper layers had in their
    own model; then end to end, half on the text itself and half on what a whole model makes of it.

    Returns:
      Its spec, its tensors in float32, and the key of the work, for `forget`.

    Raises:
      ZooError: models that cannot be joined so, or a loss that is no number any more.
    """
    check(zoo, lower, upper, joins)
    joins = sorted(joins)
    below, above = forward.load(zoo, lower.steps), forward.load(zoo, upper.steps)
    whole = forward.load(zoo, teacher.steps)
    cuts = [(layers(zoo, lower)[j.lower], layers(zoo, upper)[j.upper]) for j in joins]
    spec = StitchSpec(
        hidden_size=below.specs[0].hidden_size,
        output_size=above.specs[0].hidden_size,
        inner_size=inner_size,
        depths=tuple(j.lower for j in joins),
        norm_eps=1e-5,
    )
    work = training.key(
        [dataclasses.astuple(j) for j in joins],
        [[[s.component, *s.deltas] for s in c.steps] for c in (lower, upper, teacher)],
        [dataclasses.asdict(schedule), inner_size, "stitch"],
        data,
    )
    tensors = _start(spec, below, above, cuts, data, schedule.seed)
    fixed = (below.tensors, above.tensors, whole.tensors)

    def loss(form: int, trained: Any, fixed: Any, tokens: jax.Array, target: jax.Array):
        first, last = cuts[form]
        low, high = Weights(below.specs, fixed[0]), Weights(above.specs, fixed[1])
        x = _rows(low, first, tokens)
        x = forward.run(Weights((spec,), (trained,)), x, first_layer=joins[form].lower)
        x = forward.run(high.part(last, len(above.specs) - 2), x)
        logits = forward.head(high, x)
        _, wanted = forward.hidden_and_logits(Weights(whole.specs, fixed[2]), tokens)
        nats = training.next_token_nats(logits, tokens, target)
        return 0.5 * nats + 0.5 * training.distance(wanted, logits, target)

    def apart(form: int, trained: Any, fixed: Any, tokens: jax.Array, target: jax.Array):
        first, last = cuts[form]
        x = _rows(Weights(below.specs, fixed[0]), first, tokens)
        wanted = _rows(Weights(above.specs, fixed[1]), last, tokens)
        got = forward.run(Weights((spec,), (trained,)), x, first_layer=joins[form].lower)
        # Directions of little variance matter as much: the layers above normalise.
        return jnp.mean(((got - wanted) / (jnp.std(wanted, axis=(0, 1)) + 1e-6)) ** 2)

    for stage, (what, times) in enumerate(((apart, MATCHING), (loss, 1))):
        tensors = training.fit(
            zoo,
            training.key(work, stage),
            what,
            tensors,
            fixed,
            [data],
            dataclasses.replace(schedule, steps=times * schedule.steps),
            form=lambda step: step % len(joins),
            on_step=on_step,
        )
    return spec, tensors, work


def forget(zoo: Zoo, work: str) -> None:
    """Removes the state of a training that is in the zoo."""
    for stage in range(2):
        training.forget(zoo, training.key(work, stage))


def _start(
    spec: StitchSpec,
    below: Weights,
    above: Weights,
    cuts: Sequence[tuple[int, int]],
    data: Rows,
    seed: int,
) -> dict[str, jax.Array]:
    """The best linear map from the rows below to those the upper layers had, by ridge regression."""
    rng = np.random.default_rng(seed)
    tokens = data.tokens[: max(2, _START_TOKENS // data.tokens.shape[1])]
    means, xs, ys = [], [], []
    for first, last in cuts:
        sides = []
        for weights, end in ((below, first), (above, last)):
            part = weights.part(0, end)
            rows = _behind(part.specs, part.tensors, tokens)
            # The first position, which sees nothing, is unlike all others.
            sides.append(np.asarray(rows[:, 1:], np.float64).reshape(-1, rows.shape[-1]))
        x, y = sides
        means.append((x.mean(0), y.mean(0)))
        xs.append(x - means[-1][0])
        ys.append(y - means[-1][1])
    x, y = np.concatenate(xs), np.concatenate(ys)
    ridge = _RIDGE * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    proj = np.linalg.solve(x.T @ x + ridge, x.T @ y).T
    shapes = spec.tensors()
    start = {
        "position.gain": np.ones(shapes["position.gain"]),
        "position.bias": np.stack([m_y - proj @ m_x for m_x, m_y in means]),
        "proj.weight": proj,
        "norm.weight": np.ones(shapes["norm.weight"]),
        "up.weight": rng.standard_normal(shapes["up.weight"]) * spec.hidden_size**-0.5,
        "down.weight": np.zeros(shapes["down.weight"]),
    }
    return {n: jnp.asarray(v, jnp.float32) for n, v in start.items()}


@functools.partial(jax.jit, static_argnums=0)
def _behind(specs, tensors, tokens):
    return _rows(Weights(specs, tensors), len(specs), tokens)


def _rows(weights: Weights, count: int, tokens: jax.Array) -> jax.Array:
    """Hidden rows [B, T, d] behind the first `count` steps of a chain."""
    return forward.run(weights.part(1, count), forward.embed(weights, tokens))
