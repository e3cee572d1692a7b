"""Edges on the disk.

`edges/<id>.json` is one immutable record (edge_records.py), named by the hash of what it says. It tells what
lies in the zoo; it changes no chain. A chain that uses what an edge offers is a named chain of its own.
"""

import hashlib

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import codec
from jblock.zoo.edge_records import FOLDER, Edge
from jblock.zoo.records import (
    DamagedError,
    NewerError,
    NotFoundError,
    ZooError,
    split_version,
)
from jblock.zoo.store import Zoo


def edges(zoo: Zoo, problems: list[str] | None = None) -> list[Edge]:
    """All edges of a zoo, in the order of their ids.

    Args:
      zoo: the zoo.
      problems: takes what is wrong with an edge that cannot be read, which is left out.

    Raises:
      ZooError: one cannot be read, and `problems` is None.
    """
    found = []
    for id_ in edge_ids(zoo):
        try:
            found.append(edge(zoo, id_))
        except NotFoundError:
            continue  # removed in the meantime
        except ZooError as e:
            if problems is None:
                raise
            problems.append(str(e))
    return found


def edge_ids(zoo: Zoo) -> list[str]:
    """File names under edges/ without their ending; what has another ending is no edge."""
    names = zoo.storage.names(FOLDER)
    return [n.removesuffix(".json") for n in names if n.endswith(".json")]


def edge(zoo: Zoo, id: str) -> Edge:
    """One edge.

    Raises:
      ZooError: no such edge, or its record says something else than its id.
    """
    path = _path(id)
    try:
        data = zoo.storage.read(path)
    except NotFoundError as e:
        raise NotFoundError(
            f"{zoo.storage.location} has no edge {id}: it was removed or never added"
        ) from e
    try:
        found = Edge.from_json(codec.parse_json(data, path))
        same = found.id == id == hashlib.sha256(data.rstrip(b"\n")).hexdigest()
    except NewerError as e:
        raise NewerError(f"{path}: {e}") from e
    except (ZooError, ValueError, RecursionError) as e:
        raise DamagedError(f"edge {id}: {e}: measure it again, or remove {path}") from e
    if not same:
        raise DamagedError(f"edge {id} says something else than its id: measure it again")
    return found


def check_edge(zoo: Zoo, edge: Edge) -> None:
    """Checks that what an edge names is there.

    Raises:
      NotFoundError: what is not.
    """
    for step in (*edge.original, *edge.substitute):
        for component, _ in zoo.component(step.component).refs.values():
            zoo.component(component)
        for id_ in step.deltas:
            if zoo.delta(id_).component != step.component:
                raise DamagedError(
                    f"edge: delta {id_} is for another component than {step.component}"
                )
    if edge.chain is not None:
        name, version = split_version(edge.chain)
        if version not in zoo.versions(name):
            raise NotFoundError(
                f"{zoo.storage.location} has no model {edge.chain}: it was removed or never added"
            )


def put_edges(zoo: Zoo, *new: Edge) -> list[str]:
    """Adds edges in one go; returns their ids. Edges that say the same of the same steps, chain and probe
    as a new one are replaced by it.

    Inside `zoo.writer()`, commit what they name first.

    Raises:
      NotFoundError: one names something the zoo does not hold; nothing was added.
      ZooError: the zoo cannot be written.
    """
    with zoo.changing("adding edges") as changes:
        for one in new:
            check_edge(zoo, one)  # nothing is removed while the lock is held
        for one in new:
            changes.put(_path(one.id), (canonical_json(one.record()) + "\n").encode())
        ids, relations = {one.id for one in new}, {one.relation for one in new}
        for old in edges(zoo, problems=[]):
            if old.id not in ids and old.relation in relations:
                changes.remove(_path(old.id))
        return [one.id for one in new]


def remove_edge(zoo: Zoo, id: str) -> None:
    """Removes an edge, damaged or not; `gc` then frees what only it named.

    Raises:
      ZooError: no such edge.
    """
    with zoo.changing("removing an edge") as changes:
        if not zoo.storage.exists(_path(id)):
            raise NotFoundError(
                f"{zoo.storage.location} has no edge {id}: 'jblock convert list --edges' lists them"
            )
        changes.remove(_path(id))


def find_edge(zoo: Zoo, prefix: str) -> str:
    """The id that begins with `prefix`.

    Raises:
      ZooError: none does, or several do.
    """
    hits = [i for i in edge_ids(zoo) if i.startswith(prefix)]
    if len(hits) != 1 or not prefix:
        raise ZooError(
            f"{len(hits)} edges begin with {prefix!r}: give more of the id, as "
            "'jblock convert list --edges' has it"
        )
    return hits[0]


def _path(id: str) -> str:
    return f"{FOLDER}/{codec.check_id(id)}.json"
