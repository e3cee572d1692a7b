"""What a zoo holds, who shares it, and what sharing saves. Reads records only, no tensor.

What cannot be read is told and left out; it stops nothing else.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jblock.zoo import codec, edges, registry
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.pointer import ORIGIN, Model, check_record
from jblock.zoo.records import (
    Chain,
    ComponentRecord,
    DeltaRecord,
    TensorRecord,
    ZooError,
    printable,
)
from jblock.zoo.store import Zoo


def inventory(zoo: Zoo, name: str | None = None) -> dict[str, Any]:
    """Plain data about the whole zoo, or about one version of a model.

    Bytes are those of tensors. `logical_bytes` counts a component once for every chain that uses
    it, as separate checkpoints would; `stored_bytes` counts it once.

    Args:
      zoo: the zoo.
      name: a model, as NAME or NAME@VERSION; None: all of them, in all versions.

    Returns:
      `{"chains": [...], "components": [...], "deltas": [...], "totals": {...}, "problems": [...]}`; with a
      name, only that chain and what it uses, in the order of its steps.

    Raises:
      ZooError: no model of that name, or its own record is damaged.
    """
    problems: list[str] = []
    if name is not None:
        model, _, version = name.partition("@")
        wanted = zoo.chain(model, version or None)
    chains, models = _chains(zoo, problems)
    users: dict[str, list[str]] = defaultdict(list)
    ids = [chain.ids for chain in chains]
    for chain, own in zip(chains, ids, strict=True):
        at = f"{chain.name}@{chain.version}"
        for id_ in own:
            users[id_].append(at)
    component_ids = [i for i in zoo.storage.names("components") if codec.is_id(i)]
    delta_ids = [i for i in zoo.storage.names("deltas") if codec.is_id(i)]
    if name is not None:
        chains, ids = [wanted], [wanted.ids]
        component_ids = list(dict.fromkeys(s.component for s in wanted.steps))
        delta_ids = list(dict.fromkeys(d for s in wanted.steps for d in s.deltas))
    components = _records(zoo, component_ids, zoo.component, problems)
    deltas = _records(zoo, delta_ids, zoo.delta, problems)
    nbytes = {record.id: record.nbytes for record in (*components, *deltas)}
    steps: dict[int, dict[str, Any]] = {}  # most are common to many models
    rows = [
        _chain(chain, own, models.get(chain.name), nbytes, users, steps, problems)
        for chain, own in zip(chains, ids, strict=True)
    ]
    return {
        "zoo": zoo.storage.location,
        "chains": rows,
        "components": [_object(record, users) for record in components],
        "deltas": [_object(record, users) for record in deltas],
        "totals": {
            "chains": len(rows),
            "components": len(components),
            "deltas": len(deltas),
            "logical_bytes": sum(row["logical_bytes"] for row in rows),
            "stored_bytes": sum(nbytes.values()),
        },
        "problems": problems,
    }


def edge_inventory(zoo: Zoo, accepted: AcceptancePolicy) -> dict[str, Any]:
    """Plain data about all edges, and which of them may be used.

    Returns:
      `{"zoo", "edges": [...], "usable": count, "problems": [...]}`; each edge is its record with its `id`,
      its `policy`, whether it is `usable`, and the `reasons` against.
    """
    problems: list[str] = []
    rows = []
    for edge in edges.edges(zoo, problems):
        reasons = violations(edge, accepted)
        row = {"id": edge.id, "policy": edge.policy, **edge.to_json()}
        rows.append(row | {"usable": not reasons, "reasons": reasons})
    usable = sum(r["usable"] for r in rows)
    return {"zoo": zoo.storage.location, "edges": rows, "usable": usable, "problems": problems}


def stored_bytes(zoo: Zoo) -> int:
    """About how many tensor bytes the zoo holds: sizes of the files, damaged records included."""
    return sum(
        zoo.storage.size(f"{kind}/{name}")
        for kind in ("components", "deltas")
        for name in zoo.storage.names(kind)
    )


def _chains(zoo: Zoo, problems: list[str]) -> tuple[list[Chain], dict[str, Model]]:
    """Every version of every model, and the models by name."""
    names = zoo.models()
    problems += (
        f"{zoo.storage.location}/chains/{n} is no model: run 'fsck'"
        for n in sorted(set(zoo.storage.names("chains")) - set(names))
    )
    models: dict[str, Model] = {}
    paths: dict[str, tuple[str, int]] = {}
    for name, model in registry.read_all(zoo.storage, names):
        if isinstance(model, ZooError):
            problems.append(str(model))
            continue
        models[name] = model
        paths |= {registry.path_of(name, v): (name, v) for v in sorted(model.versions)}
    found = []
    for path, data in zoo.storage.read_many(paths).items():
        try:
            if isinstance(data, ZooError):
                raise data
            where = f"{zoo.storage.location}/{path}"
            chain = registry.parse_chain(data, *paths[path], where)
            check_record(models[chain.name].versions[chain.version], chain, data)
            found.append(chain)
        except ZooError as e:
            problems.append(str(e))
    return found, models


def _records(zoo: Zoo, ids: Sequence[str], read: Any, problems: list[str]) -> list[Any]:
    found = []
    for id_ in ids:
        try:
            found.append(read(id_))
        except ZooError as e:
            if zoo.storage.exists(f"components/{id_}") or zoo.storage.exists(f"deltas/{id_}"):
                problems.append(str(e))
    return found


def _chain(
    chain: Chain,
    ids: Sequence[str],
    model: Model | None,
    nbytes: dict[str, int],
    users: dict[str, list[str]],
    steps: dict[int, dict[str, Any]],
    problems: list[str],
) -> dict[str, Any]:
    at = f"{chain.name}@{chain.version}"
    missing = [i for i in ids if i not in nbytes]
    if missing:
        problems.append(f"{at} lacks {len(missing)} of its components and deltas: run 'fsck'")
    own = [i for i in ids if len(users[i]) < 2 and users[i] in ([at], [])]
    for step in chain.steps:
        if id(step) not in steps:
            steps[id(step)] = {"component": step.component, "deltas": list(step.deltas)}
    return {
        "name": chain.name,
        "version": chain.version,
        "active": model is not None and model.active == chain.version,
        "digest": chain.digest,
        "family": chain.family,
        "base": chain.base,
        "policy": chain.policy,
        "made_from": chain.derived.get("chain"),
        "derived": chain.derived,
        "origin": {k: printable(str(chain.origin[k])) for k in ORIGIN if k in chain.origin},
        "tokenizer": chain.tokenizer,
        "max_position": chain.max_position,
        "vocab_size": chain.vocab_size,
        "logical_bytes": sum(nbytes.get(i, 0) for i in ids),
        "own_bytes": sum(nbytes.get(i, 0) for i in own),
        "missing": missing,
        "steps": [steps[id(step)] for step in chain.steps],
    }


def _object(record: ComponentRecord | DeltaRecord, users: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "id": record.id,
        "kind": record.spec.kind,
        "nbytes": record.nbytes,
        **codec.header(record),
        "tensors": _tensors(record.tensors),
        "used_by": sorted(users[record.id]),
    }


def _tensors(tensors: dict[str, TensorRecord]) -> dict[str, Any]:
    return {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in tensors.items()}
