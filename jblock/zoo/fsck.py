"""Checking a whole zoo: every hash, every reference. What a crash can leave is not a problem."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jblock.zoo import codec, edges, lease
from jblock.zoo.records import ZooError, check_name
from jblock.zoo.store import Zoo


def fsck(zoo: Zoo, on_component: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Every problem found, one line each; empty when the zoo is sound.

    Also removes scratch folders of writers that are gone, where it may.

    Args:
      zoo: the zoo.
      on_component: called with the bytes of each component and delta once it is checked.
    """
    lease.clean(zoo.path / "tmp")
    problems: list[str] = []

    def attempt(check: Callable[..., Any], *args: Any) -> None:
        try:
            check(zoo, *args)
        except ZooError as e:
            problems.append(str(e))

    problems += (text for _, _, text in _damage(zoo, on_component))
    for name in _entries(zoo.path / "chains"):
        attempt(_chains, name, attempt)
    for id_ in edges.edge_ids(zoo):
        attempt(_edge, id_)
    return problems


def damaged(zoo: Zoo) -> list[tuple[str, str]]:
    """Kind and id of every component, delta, tokenizer and source that is damaged in itself.

    What only refers to something missing is not: it is whole again once that is.
    """
    return [(kind, id_) for kind, id_, _ in _damage(zoo, lambda nbytes: None, itself=True)]


def _damage(
    zoo: Zoo, done: Callable[[int], None], itself: bool = False
) -> Iterator[tuple[str, str, str]]:
    """Kind, id and what is wrong of everything stored that is damaged."""
    for kind, check in _CHECKS.items():
        for id_ in _entries(zoo.path / kind):
            try:
                check(zoo, id_, done)
            except ZooError as e:
                if not os.path.lexists(zoo.path / kind / id_):
                    continue  # removed while it was looked at
                if itself and id_ not in str(e):
                    continue
                yield kind, id_, str(e)


def _component(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    record = zoo.component(id_)
    # The hash covers the references; that they lead somewhere of the right shape is checked here.
    shapes = record.spec.tensors()
    for name, (component, tensor) in record.refs.items():
        target = zoo.component(component).tensors.get(tensor)
        if target is None or target.shape != tuple(shapes[name]):
            raise ZooError(f"component {id_}: {name!r} refers to {component}/{tensor}: not there")
    zoo.check_component(record)
    done(record.nbytes)


def _delta(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    record = zoo.delta(id_)
    base = zoo.component(record.component)
    shapes = {name: t.shape for name, t in record.tensors.items()}
    codec.check_shapes(f"delta {id_}", shapes, record.spec.tensors(base.spec))
    zoo.load_delta(id_, verify=True)
    done(record.nbytes)


def _tokenizer(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    zoo.files("tokenizers", id_)


def _source(zoo: Zoo, id_: str, done: Callable[[int], None]) -> None:
    zoo.files("sources", id_)


_CHECKS = {
    "components": _component,
    "deltas": _delta,
    "tokenizers": _tokenizer,
    "sources": _source,
}


def _chains(zoo: Zoo, name: str, attempt: Callable[..., None]) -> None:
    check_name(name)
    for version in zoo.versions(name):
        attempt(_chain, name, version)
    # A name without `current` is a writer killed before its first version went live.
    if (zoo.path / "chains" / name / "current").exists():
        zoo.chain(name)


def _chain(zoo: Zoo, name: str, version: int) -> None:
    chain = zoo.chain(name, version)
    zoo.check_chain(chain)
    if chain.base is not None:
        base, _, number = chain.base.rpartition("@")
        if not number.isdecimal() or int(number) not in zoo.versions(base):
            raise ZooError(f"model {name}@{version} names the base {chain.base!r}: not there")


def _edge(zoo: Zoo, id_: str) -> None:
    try:
        edges.check_edge(zoo, edges.edge(zoo, id_))
    except ZooError:
        if id_ in edges.edge_ids(zoo):  # else it was removed in the meantime
            raise


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
