"""Checking a whole zoo: every hash, every reference. What a crash can leave is not a problem."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jblock.zoo import codec, disk
from jblock.zoo.records import ZooError, check_name
from jblock.zoo.store import Zoo


def fsck(zoo: Zoo, on_component: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Every problem found, one line each; empty when the zoo is sound.

    Also removes scratch folders of writers that are gone, where it may.

    Args:
      zoo: the zoo.
      on_component: called with the bytes of each component and delta once it is checked.
    """
    disk.clean_scratch(zoo.path / "tmp")
    problems: list[str] = []

    def attempt(check: Callable[..., Any], *args: Any) -> None:
        try:
            check(zoo, *args)
        except ZooError as e:
            problems.append(str(e))

    for id_ in _entries(zoo.path / "components"):
        attempt(_component, id_, on_component)
    for id_ in _entries(zoo.path / "deltas"):
        attempt(_delta, id_, on_component)
    for kind in ("tokenizers", "sources"):
        for id_ in _entries(zoo.path / kind):
            attempt(Zoo.files, kind, id_)
    for name in _entries(zoo.path / "chains"):
        attempt(_chains, name, attempt)
    return problems


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


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
