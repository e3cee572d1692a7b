"""`jblock convert stitch` and `surrogate`: train, store, measure on what was stored, record, publish."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints import probes
from checkpoints.errors import CheckpointError
from checkpoints.probes import ProbeOptions
from checkpoints.progress import Progress
from jblock.adapt import estimate, stitching, surrogates, training, training_state
from jblock.adapt.metrics import Evaluator, Outputs
from jblock.adapt.probe import ProbeData
from jblock.adapt.stitching import Join
from jblock.blocks.spec import unquantized
from jblock.zoo.edge_records import Edge, Score, versions
from jblock.zoo.edges import put_edges
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Files to train and to measure on.

    Attributes:
      train: text.
      train_items: task items to train on, if any.
      probe: what to measure on.
    """

    train: Path
    train_items: Path | None
    probe: ProbeOptions


def stitch(
    zoo: Zoo,
    lower_name: str,
    upper_name: str,
    joins: Sequence[str],
    name: str,
    data: Data,
    schedule: training.Schedule,
    inner_size: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Trains one stitch for some joins and publishes a chain for each.

    Args:
      zoo: where both models are.
      lower_name: the model that gives the lower layers.
      upper_name: the one that gives the upper layers.
      joins: "K:J", K lower layers under the upper model's layers from J on.
      name: of the new model; with several joins NAME-K-J.
      data: files.
      schedule: of the training.
      inner_size: columns of the stitch's inner layer; None: as many as the upper model is wide.
      progress: where to tell how far it is.

    Raises:
      CheckpointError, ZooError: models that cannot be joined so, or bad files.
    """
    lower, upper = zoo.checked_chain(lower_name), zoo.checked_chain(upper_name)
    wanted = [_join(text) for text in joins]
    stitching.check(zoo, lower, upper, wanted)
    probe = probes.probe(zoo, upper, data.probe, [upper.name, name])
    rows = probes.train_text(zoo, upper, data.train)
    width = zoo.component(upper.steps[0].component).spec.hidden_size
    inner = inner_size or width
    _tell(zoo, progress, name, upper, min(j.upper for j in wanted), None, schedule, probe)
    beside = {c.name: Evaluator(zoo, c.steps, probe) for c in (lower, upper)}
    parents = {n: evaluator.original for n, evaluator in beside.items()}
    teacher = min((lower, upper), key=lambda c: parents[c.name].perplexity)
    with progress.steps(f"{name}: training", schedule.steps) as advance:
        spec, tensors, work = stitching.train(
            zoo,
            lower,
            upper,
            wanted,
            teacher,
            rows,
            schedule,
            inner,
            lambda step, value: advance(1),
        )
    component = zoo.put_component(spec, training.stored(tensors, _dtype(zoo, upper)))
    step = Step(component=component)
    settings = {
        "command": "stitch",
        "joins": [f"{j.lower}:{j.upper}" for j in wanted],
        "teacher": f"{teacher.name}@{teacher.version}",
        **_settings(schedule, rows=probes.digest(rows)),
    }
    size = zoo.component(component).nbytes
    result: dict[str, Any] = {
        "stitch": component,
        "bytes": size,
        "parents": [_row(n, out) for n, out in parents.items()],
        "models": [],
    }
    for join in wanted:
        steps = stitching.steps(zoo, lower, upper, join, step)
        at = stitching.layer_starts(zoo, upper)[join.upper]
        below = stitching.layer_starts(zoo, lower)[join.lower]
        found = {n: evaluator.measure([steps])[0] for n, evaluator in beside.items()}
        scores = {n: comparison.scores() for n, comparison in found.items()}
        edge = Edge(
            kind="stitch",
            original=upper.steps[:at],
            substitute=(*lower.steps[:below], step),
            scores=scores[upper.name],
            chain=f"{upper.name}@{upper.version}",
            probe=probe.record,
            provenance=settings,
            versions=versions(),
        )
        put_edges(zoo, edge)
        full = name if len(wanted) == 1 else f"{name}-{join.lower}-{join.upper}"
        parts = (
            f"{lower.name}@{lower.version} {join.lower}, {upper.name}@{upper.version} {join.upper}"
        )
        how = {"command": "stitch", "edge": edge.id, "parts": parts}
        made = upper.derive(full, steps, (lower.policy, "adaptive"), how)
        limit = min(lower.max_position, upper.max_position)
        published = zoo.publish(dataclasses.replace(made, max_position=limit))
        outputs = found[upper.name].substitute
        result["models"].append(_row(f"{full}@{published.version}", outputs, edge, scores))
    training_state.remove(work)
    return result


def surrogate(
    zoo: Zoo,
    of: str,
    layers: str,
    keep: float,
    name: str,
    data: Data,
    schedule: training.Schedule,
    progress: Progress,
) -> dict[str, Any]:
    """Makes a smaller substitute for some layers of a model and publishes the model with it.

    Args:
      zoo: where the model is.
      of: its name.
      layers: "FIRST:LAST", from layer FIRST up to but without LAST.
      keep: share of their parameters that is left, at most.
      name: of the new model.
      data: files.
      schedule: of the training.
      progress: where to tell how far it is.

    Raises:
      CheckpointError, ZooError: layers that have no surrogate, or bad files.
    """
    chain = zoo.checked_chain(of)
    starts = stitching.layer_starts(zoo, chain)
    first, last = _range(layers, len(starts) - 1)
    begin, end = starts[first], starts[last]
    probe = probes.probe(zoo, chain, data.probe, [chain.name, name])
    rows = [probes.train_text(zoo, chain, data.train)]
    if data.train_items is not None:
        rows.append(probes.train_items(zoo, chain, data.train_items))
    specs = [unquantized(zoo.component(s.component).spec) for s in chain.steps[begin:end]]
    surrogates.smaller(specs, keep)  # refuses what has no surrogate, before anything is computed
    _tell(zoo, progress, name, chain, last, (begin, end), schedule, probe)
    with progress.steps(f"{name}: training", schedule.steps) as advance:
        made = surrogates.train(
            zoo, chain, begin, end, keep, rows, schedule, lambda step, value: advance(1)
        )
    dtype = _dtype(zoo, chain)
    with zoo.writer() as writer:
        ids = [
            writer.put_component(spec, training.stored(tensors, dtype))
            for spec, tensors in zip(made.specs, made.tensors, strict=True)
        ]
        writer.commit()
        old = chain.steps[begin:end]
        new = tuple(
            Step(component=id_, fused_with_previous=step.fused_with_previous)
            for id_, step in zip(ids, old, strict=True)
        )
        steps = (*chain.steps[:begin], *new, *chain.steps[end:])
        (found,) = Evaluator(zoo, chain.steps, probe).measure([steps])
        before, after = found.original, found.substitute
        edge = Edge(
            kind="surrogate",
            original=old,
            substitute=new,
            scores=found.scores(),
            chain=f"{chain.name}@{chain.version}",
            probe=probe.record,
            provenance={
                "command": "surrogate",
                "layers": [first, last],
                "keep": keep,
                **_settings(schedule, **{f"rows{i}": probes.digest(r) for i, r in enumerate(rows)}),
            },
            versions=versions(),
        )
        put_edges(zoo, edge)
        how = {"command": "surrogate", "edge": edge.id}
        published = zoo.publish(chain.derive(name, steps, ("adaptive",), how))
    training_state.remove(made.work)
    return {
        "layers": [first, last],
        "parameters": {"surrogate": made.params[0], "original": made.params[1]},
        "parents": [_row(chain.name, before)],
        "models": [_row(f"{name}@{published.version}", after, edge, {chain.name: edge.scores})],
    }


def _tell(
    zoo: Zoo,
    progress: Progress,
    name: str,
    chain: Chain,
    layer: int,
    trained: tuple[int, int] | None,
    schedule: training.Schedule,
    probe: ProbeData,
) -> None:
    """Says what training and measuring will take: `layer` is the lowest frozen one above what is trained, and
    `trained` the steps that are; None is a stitch."""

    def scalars(steps: Sequence[Step]) -> int:
        return sum(estimate.scalars(zoo.component(s.component).spec) for s in steps)

    width = zoo.component(chain.steps[0].component).spec.hidden_size
    above = scalars(chain.steps[stitching.layer_starts(zoo, chain)[layer] : -2])
    own = 3 * width * width if trained is None else scalars(chain.steps[slice(*trained)])
    work = estimate.training(zoo, chain.steps, above, own, schedule.steps, schedule.batch_tokens)
    progress.note(
        f"{name}: training {work}, measuring {estimate.measuring(zoo, chain.steps, probe, 1)}"
    )


def _row(
    name: str,
    outputs: Outputs,
    edge: Edge | None = None,
    beside: Mapping[str, Mapping[str, Score]] | None = None,
) -> dict[str, Any]:
    """What is told of a model, and for one that was made its edge and its scores beside each parent."""
    row: dict[str, Any] = {
        "name": name,
        "perplexity": outputs.perplexity,
        "accuracy": outputs.accuracy,
    }
    if edge is not None and beside is not None:
        row["edge"] = edge.id
        row["beside"] = {
            parent: {measure: dataclasses.asdict(score) for measure, score in scores.items()}
            for parent, scores in beside.items()
        }
    return row


def _settings(schedule: training.Schedule, **digests: str) -> dict[str, Any]:
    return {**dataclasses.asdict(schedule), "train": digests}


def _dtype(zoo: Zoo, chain: Chain) -> str:
    """What a model's embedding is stored in."""
    return zoo.component(chain.steps[0].component).tensors["weight"].dtype


def _join(text: str) -> Join:
    lower, colon, upper = text.partition(":")
    if not colon or not lower.isdecimal() or not upper.isdecimal():
        raise CheckpointError(f"--at {text!r}: give K:J, as in 2:2")
    return Join(lower=int(lower), upper=int(upper))


def _range(text: str, count: int) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if colon and first.isdecimal() and last.isdecimal() and int(first) < int(last) <= count:
        return int(first), int(last)
    raise CheckpointError(f"--layers {text!r}: give FIRST:LAST within 0:{count}, as in 0:{count}")
