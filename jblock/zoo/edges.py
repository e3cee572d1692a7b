"""Edges on the disk.

`edges/<id>.json` is one immutable record (edge_records.py), named by the hash of what it says. It tells what
lies in the zoo; it changes no chain. A chain that uses what an edge offers is a named chain of its own.
"""

import os
from pathlib import Path

from jblock.blocks.spec import canonical_json
from jblock.zoo import codec, disk, lease
from jblock.zoo.edge_records import Edge
from jblock.zoo.records import NotFoundError, ZooError
from jblock.zoo.store import Zoo

FOLDER = "edges"


def edges(zoo: Zoo) -> list[Edge]:
    """All edges of a zoo, in the order of their ids.

    Raises:
      ZooError: one is damaged.
    """
    found = []
    for id_ in edge_ids(zoo):
        try:
            found.append(edge(zoo, id_))
        except NotFoundError:
            continue  # removed in the meantime
    return found


def edge_ids(zoo: Zoo) -> list[str]:
    """File names under edges/ without their ending."""
    folder = zoo.path / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(n.removesuffix(".json") for n in names)


def edge(zoo: Zoo, id: str) -> Edge:
    """One edge.

    Raises:
      ZooError: no such edge, or its record says something else than its id.
    """
    path = _path(zoo, id)
    if not path.is_file() or path.is_symlink():
        raise NotFoundError(f"{zoo.path} has no edge {id}: it was removed or never added")
    try:
        found = Edge.from_json(codec.read_json(path))
    except ZooError as e:
        raise ZooError(f"edge {id}: {e}: measure it again, or remove {path}") from e
    if found.id != id:
        raise ZooError(f"edge {id} says something else than its id: measure it again")
    return found


def check_edge(zoo: Zoo, edge: Edge) -> None:
    """Checks that what an edge names is there.

    Raises:
      NotFoundError: what is not.
    """
    for step in (*edge.original, *edge.substitute):
        zoo.component(step.component)
        for id_ in step.deltas:
            if zoo.delta(id_).component != step.component:
                raise ZooError(f"edge: delta {id_} is for another component than {step.component}")
    if edge.chain is not None:
        name, _, version = edge.chain.rpartition("@")
        if int(version) not in zoo.versions(name):
            raise NotFoundError(
                f"{zoo.path} has no model {edge.chain}: it was removed or never added"
            )


def put_edges(zoo: Zoo, *new: Edge) -> list[str]:
    """Adds edges in one go; returns their ids. Edges that say the same of the same steps, chain and probe
    as a new one are replaced by it.

    Inside `zoo.writer()`, commit what they name first.

    Raises:
      NotFoundError: one names something the zoo does not hold; nothing was added.
      ZooError: the zoo cannot be written.
    """
    with disk.disk_errors(zoo.path), lease.exclusive(zoo.path) as mine:
        for one in new:
            check_edge(zoo, one)  # nothing is removed while the lock is held
        folder = zoo.path / FOLDER
        folder.mkdir(exist_ok=True)
        for one in new:
            data = canonical_json(one.record()) + "\n"
            disk.write_atomic(_path(zoo, one.id), data.encode(), mine)
        ids, relations = {one.id for one in new}, {one.relation for one in new}
        for id_ in edge_ids(zoo):
            if id_ in ids:
                continue
            try:
                old = edge(zoo, id_)
            except ZooError:
                continue  # fsck tells
            if old.relation in relations:
                os.rename(_path(zoo, id_), mine / id_)
        disk.fsync_path(folder)
        return [one.id for one in new]


def remove_edge(zoo: Zoo, id: str) -> None:
    """Removes an edge, damaged or not; `gc` then frees what only it named.

    Raises:
      ZooError: no such edge.
    """
    with disk.disk_errors(zoo.path), lease.exclusive(zoo.path) as mine:
        path = _path(zoo, id)
        if not path.is_file():
            raise NotFoundError(
                f"{zoo.path} has no edge {id}: 'jblock-convert list --edges' lists them"
            )
        os.rename(path, mine / id)
        disk.fsync_path(path.parent)


def find_edge(zoo: Zoo, prefix: str) -> str:
    """The id that begins with `prefix`.

    Raises:
      ZooError: none does, or several do.
    """
    hits = [i for i in edge_ids(zoo) if i.startswith(prefix)]
    if len(hits) != 1 or not prefix:
        raise ZooError(
            f"{len(hits)} edges begin with {prefix!r}: give more of the id, as "
            "'jblock-convert list --edges' has it"
        )
    return hits[0]


def _path(zoo: Zoo, id: str) -> Path:
    return zoo.path / FOLDER / f"{codec.check_id(id)}.json"
