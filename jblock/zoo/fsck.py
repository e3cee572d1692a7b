"""Checking a whole zoo: every hash, every reference. What a crash can leave is not a problem."""

import dataclasses
from collections.abc import Callable, Iterator

from jblock.zoo import codec, edges, registry
from jblock.zoo.objects import KINDS, check_folder
from jblock.zoo.pointer import entry_of
from jblock.zoo.records import (
    Chain,
    DamagedError,
    NewerError,
    NotFoundError,
    UnreadableError,
    ZooError,
    split_version,
)
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one file or folder.

    Attributes:
      name: of it, in the zoo: "components/<id>", "chains/m/1.json".
      text: what, for people.
      damaged: it is not what was written. Else it is unreadable, of a newer version, or lacks something
        that is elsewhere: whole again once that is.
    """

    name: str
    text: str
    damaged: bool


def fsck(zoo: Zoo, on_component: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Every problem found, one line each; empty when the zoo is sound.

    Also removes scratch folders of writers that are gone, where it may.

    Args:
      zoo: the zoo.
      on_component: called with the bytes of each component and delta once it is checked.
    """
    zoo.storage.clean()
    return [problem.text for problem in problems(zoo, on_component)]


def problems(
    zoo: Zoo, on_component: Callable[[int], None] = lambda nbytes: None
) -> Iterator[Problem]:
    """What `fsck` finds, one after the other. Holds no lock: what is removed meanwhile is no problem."""
    for kind in KINDS:
        for name in zoo.storage.names(kind):
            yield from check_object(zoo, kind, name, on_component)
    for name in zoo.storage.names("chains"):
        yield from check_model(zoo, name)
    for file in zoo.storage.names(edges.FOLDER):
        yield from check_edge_file(zoo, file)


def check_object(
    zoo: Zoo, kind: str, id_: str, done: Callable[[int], None] = lambda nbytes: None
) -> Iterator[Problem]:
    """What is wrong with a component, delta, tokenizer or source, if anything."""
    name = f"{kind}/{id_}"
    if not codec.is_id(id_):
        yield Problem(name, f"{zoo.storage.location}/{name} is nothing of a zoo: remove it", True)
        return
    try:
        if kind in ("components", "deltas"):
            (_component if kind == "components" else _delta)(zoo, id_, done)
        else:
            zoo.files(kind, id_)
    except UnreadableError as e:
        yield Problem(name, str(e), False)
    except NotFoundError as e:
        # What it refers to is not there. If it is sound itself, that is for whatever names it to tell: a
        # writer that was killed while `gc` ran leaves such things, and nothing names them.
        if zoo.storage.exists(name) and _is_damaged(zoo, kind, id_, e):
            yield Problem(name, f"{kind[:-1]} {id_}: {e}", True)
    except (ZooError, *codec.DAMAGE, OSError) as e:
        if zoo.storage.exists(name):
            yield Problem(name, _line(e), _is_damaged(zoo, kind, id_, e))


def check_model(zoo: Zoo, name: str) -> Iterator[Problem]:
    """What is wrong with the versions of a model, if anything."""
    pointer = f"chains/{name}/{registry.POINTER}"
    if name not in zoo.models():
        yield Problem(
            f"chains/{name}", f"{zoo.storage.location}/chains/{name} is no model: remove it", True
        )
        return
    try:
        model = registry.read(zoo.storage, name)
    except NewerError as e:
        yield Problem(pointer, str(e), False)
        return
    except ZooError as e:
        yield Problem(pointer, str(e), isinstance(e, DamagedError))
        return
    for version in sorted(model.versions):
        path = registry.path_of(name, version)
        try:
            chain = zoo.chain(name, version)
            entry = entry_of(*registry.record(zoo.storage, name, version))
        except NotFoundError:
            continue  # removed meanwhile
        except ZooError as e:
            yield Problem(path, _line(e), isinstance(e, DamagedError))
            continue
        if model.versions[version].record and model.versions[version] != entry:
            yield Problem(
                pointer,
                f"{zoo.storage.location}/{pointer} says other things of version {version} than "
                "its record: run 'fsck --repair'",
                True,
            )
        try:
            _chain(zoo, chain)
        except ZooError as e:
            # Its own record is sound where only what it names is missing or damaged.
            inner = isinstance(e, DamagedError) and str(e).startswith(f"model {name}")
            yield Problem(path, f"{name}@{version}: {_line(e)}", inner)


def check_edge_file(zoo: Zoo, file: str) -> Iterator[Problem]:
    """What is wrong with an edge, if anything."""
    name = f"{edges.FOLDER}/{file}"
    id_ = file.removesuffix(".json")
    if not file.endswith(".json") or not codec.is_id(id_):
        yield Problem(name, f"{zoo.storage.location}/{name} is no edge: remove it", True)
        return
    try:
        edges.check_edge(zoo, edges.edge(zoo, id_))
    except (UnreadableError, NewerError) as e:
        yield Problem(name, _line(e), False)
    except (ZooError, *codec.DAMAGE) as e:
        if zoo.storage.exists(name):  # else it was removed in the meantime
            yield Problem(name, f"edge {id_}: {_line(e)}", True)


def _line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _is_damaged(zoo: Zoo, kind: str, id_: str, e: BaseException) -> bool:
    """Whether an object itself is damaged, and not something that it refers to, or of a newer version."""
    if not isinstance(e, NewerError) and kind in ("tokenizers", "sources"):
        return isinstance(e, DamagedError)
    try:
        check_folder(kind, id_, zoo.path / kind / id_)
    except UnreadableError:
        return False
    except (ZooError, OSError, *codec.DAMAGE):
        return True
    # Its bytes are those that its id stands for, so they are what was written; still, a delta that does not
    # fit its component, or a reference of another shape, was never right.
    return not isinstance(e, NewerError) and id_ in str(e)


def _component(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    record = zoo.component(id_)
    # The hash covers the references; that they lead somewhere of the right shape is checked here.
    shapes = record.spec.tensors()
    for name, (component, tensor) in record.refs.items():
        target = zoo.component(component).tensors.get(tensor)
        if target is None or target.shape != tuple(shapes[name]):
            raise DamagedError(
                f"component {id_}: {name!r} refers to {component}/{tensor}: not there"
            )
    zoo.check_component(record)
    done(record.nbytes)


def _delta(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    record = zoo.delta(id_)
    zoo.load_delta(id_, verify=True)
    done(record.nbytes)


def _chain(zoo: Zoo, chain: Chain) -> None:
    zoo.check_chain(chain)
    zoo.check_whole(chain)
    if chain.base is not None:
        name, version = split_version(chain.base)
        lost = registry.read(zoo.storage, name).lost.get(version)
        try:
            digest = lost or zoo.chain(name, version).digest
        except NotFoundError as e:
            raise NotFoundError(f"names the base {chain.base!r}: not there") from e
        if chain.base_digest not in (None, digest):
            raise ZooError(f"names a base {chain.base!r} of another digest")
