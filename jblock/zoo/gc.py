"""Removing: what no chain, edge, lease or journal names (`collect`), and chains (`remove`).

Both hold the exclusive lock, as publishing does, and publishing checks under it that all a chain names
is there. So what a chain names is never removed; a converter that found something which was removed
before it published is told so, and converts that part again.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from jblock.zoo import codec, disk, journal, lease
from jblock.zoo.records import ZooError, check_name
from jblock.zoo.store import Zoo

KINDS = ("deltas", "components", "tokenizers", "sources")
_ID = re.compile(rb"\b[0-9a-f]{64}\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder that nothing names: its `kind` ("components", ...), `id`, and bytes on the disk."""

    kind: str
    id: str
    nbytes: int


def collect(zoo: Zoo, dry_run: bool, only: Collection[str] | None = None) -> list[Garbage]:
    """Finds what nothing names, and removes it unless `dry_run`.

    Args:
      zoo: the zoo.
      dry_run: only say what would go.
      only: ids to look at; None: all.

    Raises:
      ZooError: a record is damaged, so that what it names is not known; or the zoo cannot be written.
    """
    with disk.disk_errors(zoo.path):
        lease.clean(zoo.path / "tmp")
        if dry_run:
            return _garbage(zoo, only)
        with lease.exclusive(zoo.path) as mine:
            found = _garbage(zoo, only)
            # What refers to others goes first: killed in between, nothing refers to what is gone.
            for item in sorted(found, key=lambda g: not _refers(zoo, g)):
                _take(zoo.path / item.kind / item.id, mine / f"{item.kind}-{item.id}")
            for kind in {item.kind for item in found}:
                disk.fsync_path(zoo.path / kind)
            return found


def remove(zoo: Zoo, name: str, version: int | None = None) -> list[str]:
    """Removes a model, or one version of it that is not live. `collect` then frees what only it used.

    Returns:
      What was removed, "name@version" each.

    Raises:
      ZooError: no such model, or something relies on it; the message names what.
    """
    with disk.disk_errors(zoo.path), lease.exclusive(zoo.path) as mine:
        versions = zoo.versions(name) if version is None else [zoo.chain(name, version).version]
        if not versions:
            zoo.chain(name)  # tells which ones there are
        gone = [f"{name}@{v}" for v in versions]
        users = _users(zoo, name, gone)
        if users:
            raise ZooError(f"{', '.join(gone)} cannot go, because {'; '.join(users)}")
        if version is not None and (
            version == zoo.current(name) or zoo.versions(name) == [version]
        ):
            raise ZooError(
                f"{gone[0]} is the live version: make another one live (convert it again), or "
                f"remove {name}"
            )
        folder = zoo.path / "chains" / check_name(name)
        _take(folder if version is None else folder / f"{version}.json", mine / "chain")
        disk.fsync_path(zoo.path / "chains" if version is None else folder)
        zoo.write_partition(mine)
        return gone


def _take(path: Path, into: Path) -> None:
    # Into the lease: this fails if the lock was lost.
    os.rename(path, into)


def _garbage(zoo: Zoo, only: Collection[str] | None) -> list[Garbage]:
    named = _named(zoo)
    found = []
    for kind in KINDS:
        for id_ in sorted(os.listdir(zoo.path / kind)):
            if id_ not in named and (only is None or id_ in only):
                path = zoo.path / kind / id_
                found.append(Garbage(kind=kind, id=id_, nbytes=size(path)))
    return found


def size(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(
        os.lstat(os.path.join(at, f)).st_size for at, _, files in os.walk(folder) for f in files
    )


def _named(zoo: Zoo) -> set[str]:
    """Every id that chains, edges, leases and journals name, and what those refer to in turn."""
    found = lease.used(zoo.path / "tmp") | journal.named(zoo.path)
    for path in (*zoo.path.glob("chains/*/*.json"), *zoo.path.glob("edges/**/*.json")):
        codec.read_json(path)  # a damaged record may name more than can be read
        found |= _ids(path)
    todo = set(found)
    while todo:
        id_ = todo.pop()
        for kind in ("components", "deltas"):
            new = _ids(zoo.path / kind / id_ / "spec.json") - found
            found |= new
            todo |= new
    return found


def _ids(path: Path) -> set[str]:
    try:
        return {m.decode() for m in _ID.findall(path.read_bytes())}
    except OSError:
        return set()


def _refers(zoo: Zoo, item: Garbage) -> bool:
    return bool(_ids(zoo.path / item.kind / item.id / "spec.json"))


def _users(zoo: Zoo, name: str, gone: Iterable[str]) -> list[str]:
    users = []
    gone = set(gone)
    for other in sorted(os.listdir(zoo.path / "chains")):
        for version in zoo.versions(other) if other != name else []:
            base = zoo.chain(other, version).base
            if base in gone:
                users.append(f"{other}@{version} is an adapter on {base}")
    for path in sorted(zoo.path.glob("edges/**/*.json")):
        hit = _mentions(codec.read_json(path), gone)
        if hit:
            users.append(f"the edge {path.relative_to(zoo.path)} names {hit}")
    return users


def _mentions(data: Any, gone: Collection[str]) -> str | None:
    if isinstance(data, str):
        return data if data in gone else None
    values = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return next((hit for v in values if (hit := _mentions(v, gone))), None)
