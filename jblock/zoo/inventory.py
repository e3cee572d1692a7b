"""What a zoo holds, who shares it, and what sharing saves. Reads records only, no tensor."""

import os
from collections import defaultdict
from typing import Any

from jblock.zoo import edges
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.codec import component_header, delta_header
from jblock.zoo.records import Chain, TensorRecord
from jblock.zoo.store import Zoo


def inventory(zoo: Zoo, name: str | None = None) -> dict[str, Any]:
    """Plain data about the whole zoo, or about the live version of one model.

    Bytes are those of tensors. `logical_bytes` counts a component once for every chain that uses
    it, as separate checkpoints would; `stored_bytes` counts it once.

    Returns:
      `{"chains": [...], "components": [...], "deltas": [...], "totals": {...}}`; with a name, only
      that chain and what it uses, in the order of its steps.

    Raises:
      ZooError: no model of that name, or a damaged record.
    """
    chains = [zoo.chain(n, v) for n in zoo.chains() for v in zoo.versions(n)]
    users: dict[str, set[str]] = defaultdict(set)
    for chain in chains:
        for id_ in _ids(chain):
            users[id_].add(f"{chain.name}@{chain.version}")
    component_ids = sorted(os.listdir(zoo.path / "components"))
    delta_ids = sorted(os.listdir(zoo.path / "deltas"))
    if name is not None:
        chains = [zoo.chain(name)]
        component_ids = list(dict.fromkeys(s.component for s in chains[0].steps))
        delta_ids = list(dict.fromkeys(d for s in chains[0].steps for d in s.deltas))
    components = [_component(zoo, id_, users[id_]) for id_ in component_ids]
    deltas = [_delta(zoo, id_, users[id_]) for id_ in delta_ids]
    nbytes = {entry["id"]: entry["nbytes"] for entry in (*components, *deltas)}
    rows = [_chain(zoo, chain, nbytes, users) for chain in chains]
    return {
        "zoo": str(zoo.path),
        "chains": rows,
        "components": components,
        "deltas": deltas,
        "totals": {
            "chains": len(rows),
            "components": len(components),
            "deltas": len(deltas),
            "logical_bytes": sum(row["logical_bytes"] for row in rows),
            "stored_bytes": sum(nbytes.values()),
        },
    }


def edge_inventory(zoo: Zoo, accepted: AcceptancePolicy) -> dict[str, Any]:
    """Plain data about all edges, and which of them may be used.

    Returns:
      `{"zoo", "edges": [...], "usable": count}`; each edge is its record with its `id`, its `policy`,
      whether it is `usable`, and the `reasons` against.

    Raises:
      ZooError: an edge is damaged.
    """
    rows = []
    for edge in edges.edges(zoo):
        reasons = violations(edge, accepted)
        row = {"id": edge.id, "policy": edge.policy, **edge.to_json()}
        rows.append(row | {"usable": not reasons, "reasons": reasons})
    return {"zoo": str(zoo.path), "edges": rows, "usable": sum(r["usable"] for r in rows)}


def _ids(chain: Chain) -> list[str]:
    """Distinct component and delta ids of a chain."""
    return list(dict.fromkeys(i for s in chain.steps for i in (s.component, *s.deltas)))


def _chain(
    zoo: Zoo, chain: Chain, nbytes: dict[str, int], users: dict[str, set[str]]
) -> dict[str, Any]:
    own = [i for i in _ids(chain) if len(users[i]) == 1]
    return {
        "name": chain.name,
        "version": chain.version,
        "live": zoo.current(chain.name) == chain.version,
        "family": chain.family,
        "base": chain.base,
        "policy": chain.policy,
        "derived": chain.derived,
        "origin": chain.origin,
        "tokenizer": chain.tokenizer,
        "max_position": chain.max_position,
        "vocab_size": chain.vocab_size,
        "logical_bytes": sum(nbytes[i] for i in _ids(chain)),
        "own_bytes": sum(nbytes[i] for i in own),
        "steps": [{"component": s.component, "deltas": list(s.deltas)} for s in chain.steps],
    }


def _component(zoo: Zoo, id_: str, users: set[str]) -> dict[str, Any]:
    record = zoo.component(id_)
    return {
        "id": id_,
        "kind": record.spec.kind,
        "nbytes": record.nbytes,
        **component_header(record),
        "tensors": _tensors(record.tensors),
        "used_by": sorted(users),
    }


def _delta(zoo: Zoo, id_: str, users: set[str]) -> dict[str, Any]:
    record = zoo.delta(id_)
    return {
        "id": id_,
        "kind": record.spec.kind,
        "nbytes": record.nbytes,
        **delta_header(record),
        "tensors": _tensors(record.tensors),
        "used_by": sorted(users),
    }


def _tensors(tensors: dict[str, TensorRecord]) -> dict[str, Any]:
    return {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in tensors.items()}


def stored_bytes(zoo: Zoo) -> int:
    """About how many tensor bytes the zoo holds: sizes of the files, damaged records included."""
    total = 0
    for kind in ("components", "deltas"):
        for folder, _, files in os.walk(zoo.path / kind):
            total += sum(os.lstat(os.path.join(folder, f)).st_size for f in files)
    return total
