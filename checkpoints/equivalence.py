"""`jblock-convert equivalence`: what may replace what, by parameters and by what comes out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import probes
from checkpoints.errors import CheckpointError
from checkpoints.progress import Progress
from jblock.adapt import substitution
from jblock.adapt.probe import ProbeData
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.edge_records import Edge
from jblock.zoo.edges import put_edges
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to look for, and on what to measure it.

    Attributes:
      names: models to find substitutes for; none means all that are exact.
      cosine: smallest cosine of a candidate's parameters.
      text: held-out text; None: candidates only, nothing is measured.
      items: [MODEL=]FILE of task items.
      tokens: of the text.
      max_items: of a task.
      accepted: what the operator accepts.
      suffix: publish the recommended chains under NAME + suffix; None: only tell.
    """

    names: Sequence[str]
    cosine: float
    text: Path | None
    items: Sequence[str]
    tokens: int
    max_items: int
    accepted: AcceptancePolicy
    suffix: str | None


def run(zoo: Zoo, options: Options, progress: Progress) -> dict[str, Any]:
    """Searches, measures, records edges, recommends.

    Returns:
      `{"components", "alike", "candidates": [...], "edges": [...], "recommended": [...],
      "freed_bytes"}`.

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
    chains = {name: zoo.chain(name) for name in options.names} or exact
    used = substitution.users(exact | chains)
    total = sum(zoo.component(id_).nbytes for id_ in used)
    with progress.bar("comparing", total) as advance:
        found = substitution.search(zoo, used, options.cosine, advance)
    data: dict[str, Any] = {
        "components": found.components,
        "alike": found.alike,
        "candidates": [
            {**dataclasses.asdict(c), "used_by": sorted(used[c.original])} for c in found.candidates
        ],
        "edges": [],
        "recommended": [],
        "freed_bytes": 0,
    }
    if options.text is None:
        return data
    files = probes.by_model(options.items, list(chains))
    changes: dict[str, dict[int, Step]] = {}
    for name, chain in chains.items():
        at = substitution.places(chain, found.candidates)
        if not at:
            continue
        probe = probes.probe(
            zoo, chain, options.text, files.get(name), options.tokens, options.max_items
        )
        data["edges"] += _measure(zoo, chain, at, probe, options, progress, changes, data)
    data["freed_bytes"] = substitution.freed(zoo, exact | chains, changes)
    return data


def _measure(
    zoo: Zoo,
    chain: Chain,
    at: dict[int, Step],
    probe: ProbeData,
    options: Options,
    progress: Progress,
    changes: dict[str, dict[int, Step]],
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measures every change of one chain, each alone and neighbors together; then those to recommend."""
    provenance = {"command": "equivalence", "cosine": options.cosine}
    tried = [{i: step} for i, step in at.items()] + substitution.runs(at)
    edges: list[Edge] = []
    with progress.steps(f"{chain.name}: measuring", 2 * len(tried)) as advance:
        bench = substitution.ChainEvaluator(zoo, chain, probe, min(at))
        for change in tried:
            edges.append(bench.edge(change, bench.measure(change), provenance))
            advance(1)
        single = {i: e for i, e in zip(at, edges, strict=False)}
        kept, scores = substitution.recommend(bench, single, options.accepted, lambda: advance(1))
    if kept:
        changes[chain.name] = kept
        row: dict[str, Any] = {
            "chain": f"{chain.name}@{chain.version}",
            "steps": sorted(kept),
            "of": len(chain.steps),
            "accuracy": bench.original.accuracy,
            "perplexity": bench.original.perplexity,
            "scores": {n: dataclasses.asdict(s) for n, s in scores.items()},
        }
        together = bench.edge(kept, scores, provenance)
        if together not in edges:
            edges.append(together)
        if options.suffix is not None:
            derived = {"command": "equivalence", "edge": together.id}
            new = substitution.changed(chain, kept, chain.name + options.suffix, derived)
            published = zoo.publish(new)
            row["published"] = f"{published.name}@{published.version}"
        data["recommended"].append(row)
    put_edges(zoo, *edges)
    rows = []
    for edge in edges:
        reasons = violations(edge, options.accepted)
        rows.append({"id": edge.id, **edge.to_json(), "usable": not reasons, "reasons": reasons})
    return rows
