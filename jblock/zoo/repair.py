"""`fsck --repair`: puts right what can be, and sets aside what cannot, so that it can be made again."""

import os
from pathlib import Path

from jblock.zoo import disk, edges, lease
from jblock.zoo.fsck import damaged
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

ASIDE = "damaged"


def repair(zoo: Zoo) -> list[str]:
    """Repairs what `fsck` finds; returns what was done, one line each.

    - A damaged component, delta, tokenizer or source that no model uses is moved to `damaged/`; so is one
      in use: converting one of the models that use it again then makes it anew.
    - A model whose live version is not named gets its newest sound version.
    - An edge that is damaged, or names what is not there, is moved to `damaged/`: it can be measured again.
    - The partition, which is derived, is written anew.

    Raises:
      ZooError: the zoo cannot be written.
    """
    done = []
    with disk.disk_errors(zoo.path):
        lease.clean(zoo.path / "tmp")
        with lease.exclusive(zoo.path) as mine:
            bad = damaged(zoo)
            users = _users(zoo)
            aside = zoo.path / ASIDE
            for kind, id_ in bad:
                aside.mkdir(exist_ok=True)
                # By way of the lease, which is the fence.
                os.rename(zoo.path / kind / id_, mine / id_)
                os.rename(mine / id_, aside / f"{kind}-{id_}.{mine.name}")
                names = ", ".join(users.get(id_, [])) or "no model"
                again = f"convert one of {names} again" if id_ in users else "nothing lacks it"
                done.append(f"{kind[:-1]} {id_} was damaged, is moved to {ASIDE}/: {again}")
            done += _edges(zoo, mine)
            for name in sorted(os.listdir(zoo.path / "chains")):
                done += _live(zoo, name, mine)
            zoo.write_partition(mine)
    return done


def _edges(zoo: Zoo, mine: Path) -> list[str]:
    """Sets edges aside that cannot be used as they are."""
    done = []
    for id_ in edges.edge_ids(zoo):
        try:
            edges.check_edge(zoo, edges.edge(zoo, id_))
        except ZooError as e:
            path = zoo.path / edges.FOLDER / f"{id_}.json"
            if not path.exists():
                continue  # no edge at all: fsck names it
            (zoo.path / ASIDE).mkdir(exist_ok=True)
            os.rename(path, mine / f"{id_}.json")
            os.rename(mine / f"{id_}.json", zoo.path / ASIDE / f"edges-{id_}.{mine.name}.json")
            done.append(f"edge {id_} is moved to {ASIDE}/ ({e}): measure it again if it is wanted")
    return done


def _users(zoo: Zoo) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    for name in sorted(os.listdir(zoo.path / "chains")):
        for version in zoo.versions(name):
            try:
                chain = zoo.chain(name, version)
            except ZooError:
                continue
            ids = {i for s in chain.steps for i in (s.component, *s.deltas)}
            for id_ in ids | {chain.tokenizer or "", chain.source_files or ""}:
                users.setdefault(id_, []).append(f"{name}@{version}")
    return users


def _live(zoo: Zoo, name: str, mine: Path) -> list[str]:
    """Names the newest sound version as live where `current` is damaged."""
    if not (zoo.path / "chains" / name / "current").exists():
        return []  # a writer was killed before its first version went live
    try:
        zoo.chain(name)
        return []
    except ZooError:
        pass
    for version in reversed(zoo.versions(name)):
        try:
            zoo.chain(name, version)
        except ZooError:
            continue
        data = f"{version}\n".encode()
        disk.write_atomic(zoo.path / "chains" / name / "current", data, mine)
        return [f"{name}: its live version was not named; now it is {version}"]
    return []
