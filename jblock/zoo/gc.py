"""Removing: what no chain, edge, lease or journal names (`collect`), and chains (`remove`).

Both hold the exclusive lock, as publishing does, and publishing checks under it that all a chain names
is there. So what a chain names is never removed; a converter that found something which was removed
before it published is told so, and converts that part again. What a server has loaded, or may load, is in its
lease.

A record that cannot be read does not stop either. What it names is kept: a model's pointer has the beginnings
of the ids; of an edge, and in zoos of format 1, it is all that was there when the record was written.
"""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

from jblock.zoo import codec, edges, journal, registry
from jblock.zoo.objects import KINDS
from jblock.zoo.records import DamagedError, NotFoundError, ZooError
from jblock.zoo.store import Zoo

_ID = re.compile(rb"\b[0-9a-f]{64}\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder that nothing names: its `kind` ("components", ...), `id`, and bytes on the disk."""

    kind: str
    id: str
    nbytes: int


def collect(
    zoo: Zoo,
    dry_run: bool,
    only: Collection[str] | None = None,
    problems: list[str] | None = None,
) -> list[Garbage]:
    """Finds what nothing names, and removes it unless `dry_run`.

    Args:
      zoo: the zoo.
      dry_run: only say what would go.
      only: ids to look at; None: all.
      problems: takes a line for each record that cannot be read, and for what is kept because of it.

    Raises:
      ZooError: the zoo cannot be written.
    """
    told = problems if problems is not None else []
    zoo.storage.clean()
    if dry_run:
        return _garbage(zoo, only, told)
    with zoo.changing("gc") as changes:
        found = _garbage(zoo, only, told)
        # What refers to others goes first: killed in between, nothing refers to what is gone.
        for item in sorted(found, key=lambda g: not _refers(zoo, g)):
            changes.remove(f"{item.kind}/{item.id}")
        for name, version in _unlisted(zoo):
            changes.remove(registry.path_of(name, version))
        return found


def remove(
    zoo: Zoo, name: str, version: int | str | None = None, problems: list[str] | None = None
) -> list[str]:
    """Removes a model, or one version of it that is not active. `collect` then frees what only it used.

    Its numbers are never given again, and its history stays.

    Args:
      zoo: the zoo.
      name: of the model.
      version: its number or an alias; None: all versions.
      problems: takes a line for each other record that cannot be read.

    Returns:
      What was removed, "name@version" each.

    Raises:
      ZooError: no such model, or something relies on it; the message names what.
    """
    with zoo.changing(f"removing {name}") as changes:
        model = _model(zoo, name)
        if version is None:
            versions = sorted(model.versions)
        else:
            versions = [registry.resolve(model, str(version))]
        if not versions:
            zoo.chain(name)  # tells which models there are
        removed = [f"{name}@{v}" for v in versions]
        users = _users(zoo, name, removed, problems if problems is not None else [])
        if users:
            raise ZooError(f"{', '.join(removed)} cannot go, because {'; '.join(users)}")
        if version is not None:
            (number,) = versions
            if number == model.active:
                raise ZooError(
                    f"{removed[0]} is the active version: make another one active ('jblock-convert "
                    f"activate'), or remove {name}"
                )
            named = [a for a, v in model.aliases.items() if v == number]
            if named:
                raise ZooError(
                    f"{removed[0]} cannot go, because the alias {name}@{named[0]} names it: give that to "
                    "another version, or take it away ('jblock-convert alias')"
                )
        registry.remove(zoo.storage, changes, model, versions)
        return removed


def _model(zoo: Zoo, name: str) -> registry.Model:
    """The pointer of a model, or one made of its files where that is damaged: what is to go has to go."""
    try:
        model = registry.read(zoo.storage, name)
        return registry.with_digests(zoo.storage, model)
    except DamagedError:
        numbers = registry.version_files(zoo.storage, name)
        return registry.Model(
            name=name,
            next=max(numbers, default=0) + 1,
            versions=dict.fromkeys(numbers, ""),
            state=zoo.storage.pointer(f"chains/{name}/{registry.POINTER}")[1],
        )


def _garbage(zoo: Zoo, only: Collection[str] | None, problems: list[str]) -> list[Garbage]:
    named, since = _named(zoo, problems)
    found, kept = [], 0
    for kind in KINDS:
        for id_ in zoo.storage.names(kind):
            if not codec.is_id(id_) or id_ in named or (only is not None and id_ not in only):
                continue
            name = f"{kind}/{id_}"
            try:
                if since is not None and zoo.storage.modified(name) <= since:
                    kept += 1
                    continue
                found.append(Garbage(kind=kind, id=id_, nbytes=zoo.storage.size(name)))
            except FileNotFoundError:
                continue  # removed meanwhile
    if kept:
        problems.append(
            f"{kept} entries that nothing else names are kept, because a record that cannot be read may "
            "name them: 'fsck --repair' takes damaged records away"
        )
    return found


def _named(zoo: Zoo, problems: list[str]) -> tuple[set[str], float | None]:
    """Every id that chains, edges, leases and journals name, and what those refer to in turn; and until when
    what could not be read was written."""
    found = zoo.storage.used() | journal.named(zoo.path)
    since: float | None = None
    paths = [p for p, _ in _records(zoo, problems)]
    for path, data in zoo.storage.read_many(paths).items():
        if isinstance(data, NotFoundError):
            continue
        if not isinstance(data, ZooError):
            found |= _ids(data)
            try:
                codec.parse_json(data, path)
                continue
            except ZooError as e:
                data = e
        problems.append(str(data))
        short = _short_ids(zoo, path)
        if short:
            found |= {i for kind in KINDS for i in zoo.storage.names(kind) if i[:8] in short}
        else:
            with contextlib.suppress(FileNotFoundError):
                since = max(since or 0.0, zoo.storage.modified(path))
    for name in zoo.models():
        try:
            registry.read(zoo.storage, name)
        except ZooError as e:
            problems.append(str(e))
    todo = set(found)
    while todo:
        id_ = todo.pop()
        for kind in ("components", "deltas"):
            new = _referred(zoo, kind, id_) - found
            found |= new
            todo |= new
    return found, since


def _records(zoo: Zoo, problems: list[str]) -> list[tuple[str, str]]:
    """Files that name ids: versions that a pointer lists, or all where it cannot be read, and edges."""
    found = []
    for name in zoo.models():
        try:
            numbers = sorted(registry.read(zoo.storage, name).versions)
        except ZooError:
            numbers = registry.version_files(zoo.storage, name)
        found += [(registry.path_of(name, v), name) for v in numbers]
    names = zoo.storage.names(edges.FOLDER)
    return [*found, *((f"{edges.FOLDER}/{n}", "") for n in names if n.endswith(".json"))]


def _short_ids(zoo: Zoo, path: str) -> set[str]:
    """The beginnings of the ids that a version names, by its model's pointer; none if that is not known."""
    parts = path.split("/")
    if parts[0] != "chains":
        return set()
    try:
        text = registry.read(zoo.storage, parts[1]).named.get(int(parts[2].split(".")[0]), "")
    except ZooError:
        return set()
    return {text[i : i + 8] for i in range(0, len(text), 8)}


def _unlisted(zoo: Zoo) -> list[tuple[str, int]]:
    """Versions that a killed writer left, which no pointer lists."""
    found = []
    for name in zoo.models():
        try:
            model = registry.read(zoo.storage, name)
        except ZooError:
            continue
        numbers = registry.version_files(zoo.storage, name)
        found += [(name, v) for v in numbers if v not in model.versions]
    return found


def _ids(data: bytes) -> set[str]:
    return {m.decode() for m in _ID.findall(data)}


def _referred(zoo: Zoo, kind: str, id_: str) -> set[str]:
    try:
        return _ids(zoo.storage.read(f"{kind}/{id_}/spec.json"))
    except ZooError:
        return set()


def _refers(zoo: Zoo, item: Garbage) -> bool:
    return bool(_referred(zoo, item.kind, item.id) - {item.id})


def _users(zoo: Zoo, name: str, removed: Iterable[str], problems: list[str]) -> list[str]:
    users = []
    removed = set(removed)
    for other in zoo.models():
        if other == name:
            continue
        try:
            versions = zoo.versions(other)
        except ZooError as e:
            problems.append(str(e))
            continue
        for version in versions:
            try:
                base = registry.chain(zoo.storage, other, version).base
            except ZooError as e:
                problems.append(str(e))
                continue
            if base in removed:
                users.append(f"{other}@{version} is an adapter on {base}")
    for file in zoo.storage.names(edges.FOLDER):
        path = f"{edges.FOLDER}/{file}"
        if not file.endswith(".json"):
            continue
        try:
            hit = _mentions(codec.parse_json(zoo.storage.read(path), path), removed)
        except ZooError as e:
            problems.append(str(e))
            continue
        if hit:
            users.append(f"the edge {path} names {hit}")
    return users


def _mentions(data: Any, removed: Collection[str]) -> str | None:
    if isinstance(data, str):
        return data if data in removed else None
    values = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return next((hit for v in values if (hit := _mentions(v, removed))), None)
