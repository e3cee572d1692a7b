"""What nothing names any more: no chain, edge, lease or journal.

A record that cannot be read does not stop the search. What it names is kept: a model's pointer has the
beginnings of the ids; of an edge, and in zoos of format 1, it is all that was there when the record was
written.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection

from jblock.zoo import codec, journal, registry
from jblock.zoo.edge_records import FOLDER as EDGES
from jblock.zoo.objects import KINDS
from jblock.zoo.pointer import NAMED
from jblock.zoo.records import NotFoundError, UnreadableError, ZooError
from jblock.zoo.storage import Changes, Storage

_ID = re.compile(rb"\b[0-9a-f]{64}\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder that nothing names: its `kind` ("components", ...), `id`, and bytes on the disk."""

    kind: str
    id: str
    nbytes: int


def find(
    storage: Storage, only: Collection[str] | None = None, problems: list[str] | None = None
) -> list[Garbage]:
    """What nothing names; see `gc.collect`.

    Args:
      storage: of the zoo.
      only: ids to look at; None: all.
      problems: takes a line for each record that cannot be read, and for what is kept because of it.
    """
    problems = problems if problems is not None else []
    named, since = _named(storage, problems)
    found, kept = [], 0
    for kind in KINDS:
        for id_ in storage.names(kind):
            if not codec.is_id(id_) or id_ in named or (only is not None and id_ not in only):
                continue
            name = f"{kind}/{id_}"
            try:
                if since is not None and storage.modified(name) <= since:
                    kept += 1
                    continue
                found.append(Garbage(kind=kind, id=id_, nbytes=storage.size(name)))
            except FileNotFoundError:
                continue  # removed meanwhile
    if kept:
        problems.append(
            f"{kept} entries that nothing else names are kept, because a record that cannot be read may "
            "name them: 'fsck --repair' takes damaged records away"
        )
    return found


def sweep(storage: Storage, changes: Changes, found: Collection[Garbage]) -> None:
    """Removes what `find` found, under the lock that it was found under."""
    # What refers to others goes first: killed in between, nothing refers to what is gone.
    for item in sorted(found, key=lambda g: not _refers(storage, g)):
        changes.remove(f"{item.kind}/{item.id}")
    for name, version in _unlisted(storage):
        changes.remove(registry.path_of(name, version))


def _named(storage: Storage, problems: list[str]) -> tuple[set[str], float | None]:
    """Every id that chains, edges, leases and journals name, and what those refer to in turn; and until when
    what could not be read was written."""
    found = storage.used() | journal.named(storage.root)
    paths, since = _records(storage, problems)
    for path, data in storage.read_many(paths).items():
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
        short = _short_ids(storage, path)
        if short:
            found |= {i for kind in KINDS for i in storage.names(kind) if i[:8] in short}
        else:
            with contextlib.suppress(FileNotFoundError):
                since = max(since or 0.0, storage.modified(path))
    for name in registry.models(storage):
        try:
            registry.read(storage, name)
        except ZooError as e:
            problems.append(str(e))
    todo = set(found)
    while todo:
        id_ = todo.pop()
        for kind in ("components", "deltas"):
            new = _referred(storage, kind, id_) - found
            found |= new
            todo |= new
    return found, since


def _records(storage: Storage, problems: list[str]) -> tuple[list[str], float | None]:
    """Files that name ids: versions that a pointer lists, or all where it cannot be read, and edges; and
    until when what is there may be named, which is for ever where a model's folder cannot be looked into."""
    found, since = [], None
    for name in registry.models(storage):
        try:
            numbers = sorted(registry.read(storage, name).versions)
        except ZooError:
            try:
                numbers = registry.version_files(storage, name)
            except UnreadableError as e:
                problems.append(str(e))
                since = math.inf
                continue
        found += [registry.path_of(name, v) for v in numbers]
    names = storage.names(EDGES)
    return [*found, *(f"{EDGES}/{n}" for n in names if n.endswith(".json"))], since


def _short_ids(storage: Storage, path: str) -> set[str]:
    """The beginnings of the ids that a version names, by its model's pointer; none if that is not known."""
    parts = path.split("/")
    if parts[0] != "chains":
        return set()
    try:
        entry = registry.read(storage, parts[1]).versions.get(int(parts[2].split(".")[0]))
    except ZooError:
        return set()
    text, digits = (entry.named, NAMED if entry.record else 8) if entry else ("", 8)
    return {text[i : i + digits][:8] for i in range(0, len(text), digits)}


def _unlisted(storage: Storage) -> list[tuple[str, int]]:
    """Versions that a killed writer left, which no pointer lists."""
    found = []
    for name in registry.models(storage):
        try:
            model = registry.read(storage, name)
        except ZooError:
            continue
        numbers = registry.version_files(storage, name)
        found += [(name, v) for v in numbers if v not in model.versions]
    return found


def _ids(data: bytes) -> set[str]:
    return {m.decode() for m in _ID.findall(data)}


def _referred(storage: Storage, kind: str, id_: str) -> set[str]:
    try:
        return _ids(storage.read(f"{kind}/{id_}/spec.json"))
    except ZooError:
        return set()


def _refers(storage: Storage, item: Garbage) -> bool:
    return bool(_referred(storage, item.kind, item.id) - {item.id})
