"""`fsck --repair`: puts right what can be, and sets aside what cannot, so that it can be made again."""

import dataclasses

from jblock.zoo import codec, edges, registry
from jblock.zoo.fsck import Problem, check_edge_file, check_object, problems
from jblock.zoo.objects import KINDS
from jblock.zoo.pointer import check_record, entry_of
from jblock.zoo.records import DamagedError, NewerError, UnreadableError, ZooError
from jblock.zoo.storage import QUARANTINE, Changes
from jblock.zoo.store import Zoo


def repair(zoo: Zoo) -> list[str]:
    """Repairs what `fsck` finds; returns what was done, one line each.

    - A damaged component, delta, tokenizer or source is moved to `quarantine/`; so is a version that lacks
      something, or whose record is damaged: converting the model again brings both back.
    - A model whose active version went, or whose pointer is damaged, gets its newest sound version.
    - An edge that is damaged, or names what is not there, is moved to `quarantine/`: measure it again.
    - What is nothing of a zoo is moved there too. What cannot be read, or is of a newer version, stays.

    Hashing takes long and holds no lock; what it finds is looked at again under the lock.

    Raises:
      ZooError: the zoo cannot be written.
    """
    zoo.storage.clean()
    suspects = [p for p in problems(zoo) if p.damaged]
    done: list[str] = []
    with zoo.changing("repairing the zoo") as changes:
        users = _users(zoo)
        for problem in suspects:
            if problem.name.split("/")[0] in KINDS and _still(zoo, problem):
                done.append(_set_object_aside(zoo, changes, problem, users))
        if done:
            done += _set_users_aside(zoo, changes)
        for problem in suspects:
            if problem.name.count("/") == 1 and problem.name.startswith("chains/"):
                changes.quarantine(problem.name)
                done.append(f"{problem.name} is nothing of a zoo, is moved to {QUARANTINE}/")
        for name in zoo.models():
            done += _repair_model(zoo, changes, name)
        for file in zoo.storage.names(edges.FOLDER):
            for problem in check_edge_file(zoo, file):
                if problem.damaged:
                    changes.quarantine(problem.name)
                    done.append(
                        f"{problem.name} is moved to {QUARANTINE}/ ({problem.text}): measure it again if "
                        "it is wanted"
                    )
    return done


def _still(zoo: Zoo, problem: Problem) -> bool:
    """Whether a problem is still there: it may have been removed, or converted again, since it was found."""
    kind, id_ = problem.name.split("/", 1)
    return any(p.damaged for p in check_object(zoo, kind, id_))


def _set_object_aside(
    zoo: Zoo, changes: Changes, problem: Problem, users: dict[str, list[str]]
) -> str:
    kind, id_ = problem.name.split("/", 1)
    changes.quarantine(problem.name)
    if not codec.is_id(id_):
        return f"{problem.name} is nothing of a zoo, is moved to {QUARANTINE}/"
    names = ", ".join(users.get(id_, [])) or "no model"
    again = f"convert one of {names} again" if id_ in users else "no model uses it"
    return f"{kind[:-1]} {id_} was damaged, is moved to {QUARANTINE}/: {again}"


def _set_users_aside(zoo: Zoo, changes: Changes) -> list[str]:
    """Moves what refers to a component that is not there: nothing can use it before it is made again."""
    done = []
    for kind in ("deltas", "components"):
        for id_ in zoo.storage.names(kind):
            try:
                if kind == "deltas":
                    needs = [zoo.delta(id_).component]
                else:
                    needs = [c for c, _ in zoo.component(id_).refs.values()]
            except ZooError:
                continue
            if not all(zoo.storage.exists(f"components/{c}") for c in needs):
                changes.quarantine(f"{kind}/{id_}")
                done.append(
                    f"{kind[:-1]} {id_} refers to a component that is not there, is moved to {QUARANTINE}/"
                )
    return done


def _users(zoo: Zoo) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    for name in zoo.models():
        try:
            versions = registry.version_files(zoo.storage, name)
        except UnreadableError:
            continue  # told by fsck
        for version in versions:
            try:
                chain, _ = registry.record(zoo.storage, name, version)
            except ZooError:
                continue
            for id_ in {*chain.ids, *(folder for _, folder in chain.folders)}:
                users.setdefault(id_, []).append(f"{name}@{version}")
    return users


def _repair_model(zoo: Zoo, changes: Changes, name: str) -> list[str]:
    """Takes versions away that cannot be served any more, and points at the newest one that can."""
    done = []
    try:
        model = registry.completed(zoo.storage, registry.read(zoo.storage, name))
    except DamagedError:
        model = registry.rebuilt(zoo.storage, name)
        done.append(f"{name}: its pointer was damaged, is made again from its versions")
    except ZooError:
        return []  # unreadable, or of a newer version
    bad, sound = [], {}
    for version, entry in sorted(model.versions.items()):
        try:
            chain, data = registry.record(zoo.storage, name, version)
            check_record(entry, chain, data)
            zoo.check_chain(chain)
            sound[version] = entry_of(chain, data)
        except (UnreadableError, NewerError):
            continue
        except ZooError as e:
            bad.append((version, str(e)))
    for version, why in bad:
        path = registry.path_of(name, version)
        if zoo.storage.exists(path):
            changes.quarantine(path)
        done.append(f"{name}@{version} is moved to {QUARANTINE}/ ({why}): convert it again")
    if any(model.versions[v] != entry for v, entry in sound.items()):
        done.append(f"{name}: its pointer says of its versions what they say themselves")
    if not done:
        return []
    gone = {version for version, _ in bad}
    left = {v: sound.get(v, e) for v, e in model.versions.items() if v not in gone}
    active = model.active
    if active not in left:
        active = max(left, default=None)
        done.append(
            f"{name}: its active version is now {active}"
            if active is not None
            else f"{name} has no sound version left: convert it again"
        )
    lost = {v: e.digest for v, e in model.versions.items() if v in gone and e.digest}
    model = dataclasses.replace(
        model,
        active=active,
        versions=left,
        lost={**model.lost, **lost},
        aliases={a: v for a, v in model.aliases.items() if v in left},
    )
    registry.write(changes, model.did("repair", active or 0))
    return done
