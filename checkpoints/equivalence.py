"""`jblock convert equivalence`: what may replace what, by parameters and by what comes out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from checkpoints import probes
from checkpoints.errors import CheckpointError
from checkpoints.probes import ProbeOptions
from checkpoints.progress import Progress
from jblock.adapt import candidates, estimate, merging, substitution
from jblock.adapt.candidates import COUNTERPARTS
from jblock.adapt.substitution import ChainEvaluator, Measured, Recommendation
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.edges import put_edges
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to look for, and on what to measure it.

    Attributes:
      names: models to find substitutes for; none means all that are exact and have no adapter.
      cosine: smallest cosine of a candidate's parameters.
      probe: what to measure on; None: candidates only, nothing is measured.
      accepted: what the operator accepts.
      suffix: publish the recommended chains under NAME + suffix; None: only tell.
    """

    names: Sequence[str]
    cosine: float
    probe: ProbeOptions | None
    accepted: AcceptancePolicy
    suffix: str | None


def run(zoo: Zoo, options: Options, progress: Progress) -> dict[str, Any]:
    """Searches, measures, records edges, recommends.

    Returns:
      `{"components", "alike", "candidates": [...], "skipped": [...], "edges": [...], "recommended": [...],
      "rejected": [...], "freed_bytes"}`. `rejected` was chosen on the first half of the probe and not
      confirmed by the second.

    Raises:
      CheckpointError, ZooError: bad options, no such model, or damage.
    """
    if not -1.0 < options.cosine <= 1.0:
        raise CheckpointError(f"--cosine {options.cosine}: give more than -1 and at most 1")
    active: dict[str, Chain] = {}
    for name in zoo.chains():
        try:
            active[name] = zoo.chain(name)
            zoo.check_chain(active[name])
        except ZooError as e:  # damage of one is no concern of the others
            active.pop(name, None)
            progress.note(f"{name} is left out: {e}")
    exact = {name: chain for name, chain in active.items() if chain.policy == "exact"}
    # An adapter's own steps stay, and what replaces its base's is measured with its base.
    plain = {n: c for n, c in exact.items() if not any(s.deltas for s in c.steps)}
    chains = {name: zoo.checked_chain(name) for name in options.names} or plain
    used = candidates.users(exact | chains)
    total = sum(zoo.component(id_).nbytes for id_ in used)
    with progress.bar("comparing", total) as advance:
        found = candidates.search(zoo, used, options.cosine, advance)
    data: dict[str, Any] = {
        "components": found.components,
        "alike": found.alike,
        "candidates": [
            {**dataclasses.asdict(c), "used_by": sorted(used[c.original])} for c in found.candidates
        ],
        "skipped": [],
        "edges": [],
        "recommended": [],
        "rejected": [],
        "freed_bytes": 0,
    }
    if options.probe is None:
        return data
    changed: dict[str, Sequence[Step]] = {}
    for name, chain in chains.items():
        reason = merging.unmergeable(zoo, chain.steps)
        if chain.tokenizer is None:
            reason = "it has no tokenizer, and probes are text: convert it with one"
        if reason is not None:
            data["skipped"].append({"chain": f"{name}@{chain.version}", "reason": reason})
            progress.note(f"{name} is left out: {reason}")
            continue
        others = [
            m
            for n, m in active.items()
            if n != name and merging.unmergeable(zoo, m.steps) is None and not m.adapter
        ]
        at = substitution.places(chain, found.candidates)
        models = substitution.other_models(zoo, chain, others)
        if at or models:
            steps = _measure(zoo, chain, at, models, list(chains), options, progress, data)
            if steps is not None:
                changed[name] = steps
    data["freed_bytes"] = substitution.freed(zoo, exact | chains, changed)
    return data


def _measure(
    zoo: Zoo,
    chain: Chain,
    at: dict[int, list[Step]],
    models: Sequence[Chain],
    names: Sequence[str],
    options: Options,
    progress: Progress,
    data: dict[str, Any],
) -> tuple[Step, ...] | None:
    """Measures every change of one chain, each alone and neighbors together, and other models in its place;
    then those to recommend. Returns the steps of the chain with what is recommended."""
    assert options.probe is not None
    probe = probes.probe(zoo, chain, options.probe, names)
    provenance = {"command": "equivalence", "cosine": options.cosine}
    single = [{i: step} for i, by in at.items() for step in by]
    several = substitution.runs({i: by[0] for i, by in at.items()})
    models_measured = min(len(models), COUNTERPARTS)
    count = 2 * len(single) + len(several) + models_measured
    progress.note(f"{chain.name}: {estimate.measuring(zoo, chain.steps, probe, count)}")
    with progress.steps(f"{chain.name}: measuring", count) as advance:
        evaluator = ChainEvaluator(zoo, chain, probe)
        tried = evaluator.measure(single, lambda: advance(1))
        together = evaluator.measure(several, lambda: advance(1))
        nearest = substitution.nearest_models(evaluator, zoo, models, COUNTERPARTS)
        wholes = evaluator.measure_models(nearest, lambda: advance(1))
        advised = substitution.recommend(
            evaluator, [*tried, *wholes], options.accepted, provenance, lambda: advance(1)
        )
    edges = [evaluator.edge(m, provenance) for m in (*tried, *together, *wholes)]
    result = None
    if advised is not None:
        if advised.edge not in edges:
            edges.append(advised.edge)
        result = _advise(zoo, evaluator, advised, options, data)
    put_edges(zoo, *edges)
    for edge in edges:
        reasons = violations(edge, options.accepted)
        row = {"id": edge.id, **edge.to_json(), "usable": not reasons, "reasons": reasons}
        data["edges"].append(row)
    return result


def _advise(
    zoo: Zoo,
    evaluator: ChainEvaluator,
    advised: Recommendation,
    options: Options,
    data: dict[str, Any],
) -> tuple[Step, ...] | None:
    chain, measured = evaluator.chain, advised.measured
    row: dict[str, Any] = {
        "chain": f"{chain.name}@{chain.version}",
        "steps": sorted(measured.change) if measured.change is not None else None,
        "of": len(chain.steps),
        "accuracy": evaluator.original.accuracy,
        "perplexity": evaluator.original.perplexity,
        "scores": {n: dataclasses.asdict(s) for n, s in advised.edge.scores.items()},
    }
    if advised.reasons:
        data["rejected"].append({**row, "reasons": advised.reasons})
        return None
    if options.suffix is not None:
        how = {"command": "equivalence", "edge": advised.edge.id}
        policies = (advised.edge.policy, *_policies(zoo, measured))
        new = chain.derive(chain.name + options.suffix, measured.steps, policies, how)
        published = zoo.publish(new)
        row["published"] = f"{published.name}@{published.version}"
    data["recommended"].append(row)
    return measured.steps


def _policies(zoo: Zoo, measured: Measured) -> list[str]:
    """Policies of the models that a change takes its steps from as a whole."""
    if measured.change is not None:
        return []
    found = []
    for name in zoo.chains():
        try:
            model = zoo.chain(name)
        except ZooError:
            continue
        if model.steps == measured.steps:
            found.append(model.policy)
    return found
