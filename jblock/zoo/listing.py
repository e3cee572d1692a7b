"""The models of a zoo as a table, from their pointers and the sizes of what they share: no other record."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from jblock.zoo import codec, registry
from jblock.zoo.pointer import NAMED, Entry
from jblock.zoo.records import NotFoundError, ZooError
from jblock.zoo.store import Zoo


class _Size(msgspec.Struct):
    nbytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 42)]


_SIZE = msgspec.json.Decoder(_Size)


def list_models(zoo: Zoo) -> dict[str, Any]:
    """Plain data about every version of every model, as its pointer tells it.

    Bytes are those of tensors, as in `inventory`. Whether records and tensors are sound is for `fsck`.

    Returns:
      `{"zoo", "chains": [...], "totals": {...}, "problems": [...]}`.
    """
    problems: list[str] = []
    sizes, counts, stored = _sizes(zoo, problems)
    names = zoo.models()
    problems += (
        f"{zoo.storage.location}/chains/{n} is no model: run 'fsck'"
        for n in sorted(set(zoo.storage.names("chains")) - set(names))
    )
    rows, all_parts, users = [], [], Counter[str]()
    for name, active, entry in _entries(zoo, names, problems):
        parts = [entry.named[i : i + NAMED] for i in range(0, len(entry.named), NAMED)]
        users.update(parts)
        all_parts.append(parts)
        rows.append(
            {
                "name": name,
                "version": entry.version,
                "active": active,
                "digest": entry.digest,
                "family": entry.family,
                "base": entry.base,
                "made_from": entry.made_from,
                "policy": entry.policy,
                "origin": entry.origin,
            }
        )
    own = {part for part, count in users.items() if count == 1}
    lost = users.keys() - sizes.keys()
    sizes |= dict.fromkeys(lost, 0)
    for row, parts in zip(rows, all_parts, strict=True):
        row["logical_bytes"] = sum(map(sizes.__getitem__, parts))
        row["own_bytes"] = sum(map(sizes.__getitem__, own.intersection(parts)))
        if lost and (missing := lost.intersection(parts)):
            problems.append(
                f"{row['name']}@{row['version']} lacks {len(missing)} of what it is made of: run 'fsck'"
            )
    return {
        "zoo": zoo.storage.location,
        "chains": rows,
        "totals": {
            "chains": len(rows),
            **counts,
            "logical_bytes": sum(row["logical_bytes"] for row in rows),
            "stored_bytes": stored,
        },
        "problems": problems,
    }


def _entries(zoo: Zoo, names: list[str], problems: list[str]) -> Iterator[tuple[str, bool, Entry]]:
    for name, model in registry.read_all(zoo.storage, names):
        if isinstance(model, ZooError):
            problems.append(str(model))
            continue
        for version, entry in sorted(registry.completed(zoo.storage, model).versions.items()):
            if entry.record:
                yield name, version == model.active, entry
            else:
                problems.append(f"{name}@{version} cannot be read: run 'fsck'")


def _sizes(zoo: Zoo, problems: list[str]) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of tensors by the beginning of an id, 0 of tokenizers and sources; how many components and deltas
    there are; and the bytes of all."""
    sizes, counts = {}, {}
    for kind in ("components", "deltas"):
        ids = [i for i in zoo.storage.names(kind) if codec.is_id(i)]
        paths = {f"{kind}/{id_}/spec.json": id_ for id_ in ids}
        count = 0
        for path, data in zoo.storage.read_many(paths).items():
            try:
                if isinstance(data, ZooError):
                    raise data
                sizes[paths[path][:NAMED]] = _SIZE.decode(data).nbytes
                count += 1
            except NotFoundError:
                if zoo.storage.exists(f"{kind}/{paths[path]}"):
                    problems.append(f"{zoo.storage.location}/{path} is missing: run 'fsck'")
            except (ZooError, msgspec.MsgspecError, ValueError) as e:
                problems.append(f"{zoo.storage.location}/{path}: {e}: run 'fsck'")
        counts[kind] = count
    stored = sum(sizes.values())
    for kind in ("tokenizers", "sources"):
        sizes |= {id_[:NAMED]: 0 for id_ in zoo.storage.names(kind)}
    return sizes, counts, stored
