"""`jblock convert plan`: what adding a checkpoint or an adapter would do, before anything is written."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from checkpoints import hf
from checkpoints.adapters.adapter import open_adapter, plan_adapter
from checkpoints.adapters.adapter_plan import component_tensors
from checkpoints.bitfit import BitFitMatcher
from checkpoints.errors import CheckpointError
from checkpoints.folders import is_adapter
from checkpoints.opening import open_checkpoint
from checkpoints.progress import Progress
from jblock.blocks.delta_spec import delta_to_json
from jblock.blocks.spec_json import spec_to_json
from jblock.zoo import ids
from jblock.zoo.cut_plan import cut_plan
from jblock.zoo.partition import plan_blocks
from jblock.zoo.records import Chain, NotFoundError, Step, ZooError, check_name
from jblock.zoo.store import Zoo, is_url


def plan(
    source_path: Path, zoo_path: str | Path, name: str, base: str | None, progress: Progress
) -> dict[str, Any]:
    """What `hf` (or, with a base, `peft`) would store, and how it would be served.

    Returns:
      `steps`: a dict a component or delta: `step`, `kind`, `bytes`, `stored` (False: the zoo has it), and
      `shared_with` (models that use it); `blocks`: see `zoo.plan.cut_plan`; `cut_elsewhere`: models whose
      blocks would be cut anew, with the number of blocks before and after; totals.

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: see `errors.BAD_INPUT`.
    """
    check_name(name)
    if base is None and is_adapter(source_path):
        raise CheckpointError(
            f"{source_path} is an adapter: give --base, the model it was made for"
        )
    zoo = Zoo.open(zoo_path) if is_url(zoo_path) or Path(zoo_path, "zoo.json").exists() else None
    live: dict[str, Chain] = {}
    for other in zoo.chains() if zoo else ():
        with contextlib.suppress(ZooError):  # damage elsewhere is no concern of a new model
            live[other] = zoo.chain(other)  # type: ignore[union-attr]
    users: dict[str, set[str]] = {}
    for chain in live.values():
        for step in chain.steps:
            for id_ in (step.component, *step.deltas):
                users.setdefault(id_, set()).add(chain.name)
    if base is None:
        chain, rows, nbytes = _checkpoint(source_path, zoo, name, progress)
    elif zoo is None:
        raise ZooError(f"{zoo_path} is not a zoo, so it has no base {base!r}")
    else:
        chain, rows, nbytes = _adapter(source_path, zoo, name, base, progress)
    for row in rows:
        row["shared_with"] = sorted(users.get(row["id"], set()) - {name})
    after = {**live, name: chain}
    cost = zoo.cut_cost(live) if zoo else None
    if cost is not None:
        cost = dataclasses.replace(cost, nbytes={**cost.nbytes, **nbytes})
    old, new = (plan_blocks(chains, cost) for chains in (live, after))
    stored = sum(r["bytes"] for r in rows if r["stored"])
    return {
        "name": name,
        "steps": rows,
        "blocks": cut_plan(new, after, name, nbytes),
        "cut_elsewhere": [
            {"name": n, "blocks_before": len(old.blocks[n]), "blocks_after": len(new.blocks[n])}
            for n in sorted(new.recut(old))
            if n != name
        ],
        "cost": {"hop_seconds": cost.hop_seconds, "bytes_per_second": cost.bytes_per_second}
        if cost
        else None,
        "stored_bytes": stored,
        "logical_bytes": sum(r["bytes"] for r in rows),
    }


Planned = tuple[Chain, list[dict[str, Any]], dict[str, int]]


def _checkpoint(path: Path, zoo: Zoo | None, name: str, progress: Progress) -> Planned:
    checkpoint = open_checkpoint(path)
    plan, source = checkpoint.plan, checkpoint.source
    for note in checkpoint.notes:
        progress.note(f"{name}: {note}")
    owners: dict[str, tuple[str, str]] = {}
    rows, nbytes = [], {}
    steps: dict[int, Step] = {}
    finder = BitFitMatcher(zoo) if zoo else None
    with progress.bar(
        f"{name}: reading", sum(t.nbytes for t in source.tensors.values())
    ) as advance:
        for i in hf.in_order(plan):
            step, delta = plan.steps[i], None
            refs = {t: list(owners[n]) for t, n in step.tensors.items() if n in owners}
            own = {t: source.read(n) for t, n in step.tensors.items() if t not in refs}
            shared = hf.share(finder, step.spec, own, refs, steps.get(i + 1))
            if shared is None:
                id_ = ids.content_id({"spec": spec_to_json(step.spec), "refs": refs}, own)
            else:
                id_ = shared.component
                header = {"spec": delta_to_json(shared.spec), "component": id_}
                delta = ids.content_id(header, shared.vectors)
            owners |= {step.tensors[t]: (id_, t) for t in own}
            nbytes[id_] = sum(v.nbytes for v in own.values())
            steps[i] = Step(
                component=id_,
                deltas=(delta,) if delta is not None else (),
                fused_with_previous=step.fused_with_previous,
            )
            rows.append(_row(i, step.spec.kind, id_, nbytes[id_], _has(zoo, "components", id_)))
            if shared is not None and delta is not None:
                size = sum(v.nbytes for v in shared.vectors.values())
                rows.append(_row(i, shared.spec.kind, delta, size, _has(zoo, "deltas", delta)))
            advance(nbytes[id_])
    rows.sort(key=lambda row: row["step"])
    chain = Chain(
        name=name,
        family=checkpoint.family.name,
        steps=tuple(steps[i] for i in sorted(steps)),
        tokenizer=None,
        max_position=plan.max_position,
        vocab_size=plan.vocab_size,
    )
    return chain, rows, nbytes


def _adapter(path: Path, zoo: Zoo, name: str, base_name: str, progress: Progress) -> Planned:
    base = zoo.checked_chain(base_name)
    config, source = open_adapter(path)
    nbytes, rows, steps = {}, [], list(base.steps)
    planned = plan_adapter(zoo, base, config, source)
    with progress.bar(
        f"{name}: reading", sum(t.nbytes for t in source.tensors.values())
    ) as advance:
        for i, step in enumerate(base.steps):
            record = zoo.component(step.component)
            component, size, there = step.component, record.nbytes, True
            if i in planned.replaced:
                stored = zoo.load_component(component)
                own = component_tensors(stored, planned.replaced[i], source)
                if own is not None:
                    header: dict[str, Any] = {
                        "spec": spec_to_json(planned.spec(record.spec)),
                        "refs": {},
                    }
                    component = ids.content_id(header, own)
                    size = sum(v.nbytes for v in own.values())
                    there = _has(zoo, "components", component)
            nbytes[component] = size
            steps[i] = dataclasses.replace(step, component=component)
            rows.append(_row(i, record.spec.kind, component, size, there))
            for delta in planned.on(i):
                tensors = {t: taken.read(source) for t, taken in delta.tensors.items()}
                header = {"spec": delta_to_json(delta.spec), "component": component}
                id_ = ids.content_id(header, tensors)
                size = sum(v.nbytes for v in tensors.values())
                steps[i] = dataclasses.replace(steps[i], deltas=(*steps[i].deltas, id_))
                rows.append(_row(i, delta.spec.kind, id_, size, _has(zoo, "deltas", id_)))
                advance(size)
    return dataclasses.replace(base, name=name, version=0, steps=tuple(steps)), rows, nbytes


def _row(step: int, kind: str, id_: str, nbytes: int, there: bool) -> dict[str, Any]:
    return {"step": step, "kind": kind, "id": id_, "bytes": nbytes, "stored": not there}


def _has(zoo: Zoo | None, kind: str, id_: str) -> bool:
    if zoo is None:
        return False
    try:
        return zoo.folder(kind, id_).is_dir()
    except NotFoundError:
        return False
