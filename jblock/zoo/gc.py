"""Removing: what no chain, edge, lease or journal names (`collect`), and chains (`remove`).

Both hold the exclusive lock, as publishing does, and publishing checks under it that all a chain names
is there. So what a chain names is never removed; a converter that found something which was removed
before it published is told so, and converts that part again. What a server has loaded, or may load, is in its
lease.
"""

from collections.abc import Collection, Iterable
from typing import Any

from jblock.zoo import codec, garbage, registry
from jblock.zoo.edge_records import FOLDER as EDGES
from jblock.zoo.garbage import Garbage
from jblock.zoo.pointer import Model
from jblock.zoo.records import DamagedError, ZooError
from jblock.zoo.store import Zoo


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
    zoo.storage.clean()
    if dry_run:
        return garbage.find(zoo.storage, only, problems)
    with zoo.changing("gc") as changes:
        found = garbage.find(zoo.storage, only, problems)
        garbage.sweep(zoo.storage, changes, found)
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
                    f"{removed[0]} is the active version: make another one active ('jblock convert "
                    f"activate'), or remove {name}"
                )
            named = [a for a, v in model.aliases.items() if v == number]
            if named:
                raise ZooError(
                    f"{removed[0]} cannot go, because the alias {name}@{named[0]} names it: give that to "
                    "another version, or take it away ('jblock convert alias')"
                )
        registry.remove(zoo.storage, changes, model, versions)
        return removed


def _model(zoo: Zoo, name: str) -> Model:
    """The pointer of a model, or one made of its files where that is damaged: what is to go has to go."""
    try:
        model = registry.read(zoo.storage, name)
        return registry.completed(zoo.storage, model)
    except DamagedError:
        return registry.rebuilt(zoo.storage, name)


def _users(zoo: Zoo, name: str, removed: Iterable[str], problems: list[str]) -> list[str]:
    users = []
    removed = set(removed)
    for other, model in registry.read_all(zoo.storage, [m for m in zoo.models() if m != name]):
        if isinstance(model, ZooError):
            problems.append(str(model))
            continue
        for version, entry in registry.completed(zoo.storage, model).versions.items():
            if not entry.record:
                problems.append(f"{other}@{version} cannot be read: run 'fsck'")
            if entry.base in removed:
                users.append(f"{other}@{version} is an adapter on {entry.base}")
    for file in zoo.storage.names(EDGES):
        path = f"{EDGES}/{file}"
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
