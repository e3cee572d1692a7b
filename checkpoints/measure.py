"""`jblock convert measure`, and the measuring of what compress and quantize make."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoints import probes
from checkpoints.probes import ProbeOptions
from checkpoints.progress import Progress
from jblock.adapt import estimate, substitution
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.edge_records import Score
from jblock.zoo.edges import put_edges
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


def measure(
    zoo: Zoo,
    model: Chain,
    against: Chain,
    options: ProbeOptions,
    accepted: AcceptancePolicy,
    progress: Progress,
    provenance: Mapping[str, Any] | None = None,
    more: Mapping[str, Score] | None = None,
) -> dict[str, Any]:
    """Puts two models through a probe, and records an edge that says how far the one is from the other.

    Args:
      zoo: has both.
      model: that may take the place of the other.
      against: that it is held against; items for it are used, and its chat template.
      options: of the probe.
      accepted: what the operator accepts.
      progress: where to tell what it will take.
      provenance: of the edge; by default the command.
      more: further scores of the edge.

    Returns:
      `{"model", "against", "edge", "kind", "policy", "scores", "perplexity", "accuracy", "usable",
      "reasons"}`; perplexity and accuracy are of the model, then of what it is held against.

    Raises:
      CheckpointError, ZooError: models that cannot be compared, or bad files.
    """
    names = [against.name, model.name]
    data = probes.probe(zoo, against, options, names)
    progress.note(
        f"{model.name} beside {against.name}: {estimate.measuring(zoo, against.steps, data, 1)}"
    )
    how = {"command": "measure"} if provenance is None else provenance
    edge, found = substitution.beside(zoo, against, model, data, how, more)
    put_edges(zoo, edge)
    reasons = violations(edge, accepted)
    return {
        "model": f"{model.name}@{model.version}",
        "against": edge.chain,
        "edge": edge.id,
        "kind": edge.kind,
        "policy": edge.policy,
        "scores": {n: dataclasses.asdict(s) for n, s in edge.scores.items()},
        "perplexity": [found.substitute.perplexity, found.original.perplexity],
        "accuracy": [found.substitute.accuracy, found.original.accuracy],
        "usable": not reasons,
        "reasons": reasons,
    }
