"""Copying models between zoos: only what the other one lacks is read and written."""

import dataclasses
from collections.abc import Callable

from jblock.zoo import edges
from jblock.zoo.records import Chain, NotFoundError, ZooError
from jblock.zoo.store import Zoo
from jblock.zoo.writer import Writer


def copy(
    source: Zoo,
    target: Zoo,
    name: str,
    version: int | None = None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> tuple[Chain, int]:
    """Copies one version of a model, and the base it is an adapter on, into another zoo.

    Edges between what the other zoo has then go along; nothing is sent for an edge's sake alone.
    A copy that was interrupted leaves what it had moved in, which the next one finds there.

    Args:
      source: where the model is.
      target: where it goes.
      name: its name, in both.
      version: which version; None: the live one.
      on_bytes: called with the tensor bytes of each component and delta once the target has it.

    Returns:
      The chain in the target, and the tensor bytes that were new to it.

    Raises:
      ZooError: no such model, damage in the source, or a target that cannot be written.
    """
    chain = source.chain(name, version)
    sent = 0
    fields = chain.to_json() | {"version": 0}
    if chain.base is not None:
        base_name, _, number = chain.base.rpartition("@")
        base, sent = copy(source, target, base_name, int(number), on_bytes)
        fields["base"] = f"{base.name}@{base.version}"
    with target.writer() as writer:
        for step in chain.steps:
            _component(source, writer, step.component, on_bytes)
            for id_ in step.deltas:
                _delta(source, writer, id_, on_bytes)
            writer.advance()
        for kind, folder in (("tokenizers", chain.tokenizer), ("sources", chain.source_files)):
            if folder is not None:
                files = source.files(kind, folder)
                writer.put_files(kind, files)
        published = writer.publish(Chain.from_json(fields))
        sent += writer.new_bytes
    copy_edges(source, target)
    return published, sent


def copy_edges(source: Zoo, target: Zoo) -> int:
    """Copies the edges of which the target has all that they name; returns how many were new to it.

    Raises:
      ZooError: an edge of the source is damaged, or the target cannot be written.
    """
    there = set(edges.edge_ids(target))
    found = []
    for edge in edges.edges(source):
        try:
            if edge.chain is not None:
                edge = dataclasses.replace(edge, chain=_version_there(source, target, edge.chain))
            edges.check_edge(target, edge)
        except NotFoundError:
            continue  # it may come with another model
        if edge.id not in there:
            found.append(edge)
    if found:
        edges.put_edges(target, *found)
    return len(found)


def _version_there(source: Zoo, target: Zoo, name_at: str) -> str:
    """The version of a model in the target that has the same steps."""
    name, _, version = name_at.rpartition("@")
    steps = source.chain(name, int(version)).steps
    for number in reversed(target.versions(name)):
        if target.chain(name, number).steps == steps:
            return f"{name}@{number}"
    raise NotFoundError(f"{target.path} has no model {name_at}")


def check_same(wanted: str, found: str) -> None:
    """Checks that what was read has the id it was asked for by.

    Raises:
      ZooError: it has another.
    """
    if wanted != found:
        raise ZooError(f"{wanted} holds other content than its id says ({found}): run fsck")


def _component(source: Zoo, writer: Writer, id_: str, on_bytes: Callable[[int], None]) -> None:
    record = source.component(id_)
    if not writer.has("components", id_):
        for owner, _ in record.refs.values():
            _component(source, writer, owner, lambda nbytes: None)
        tensors = source.load_component(id_)
        own = {name: tensors[name] for name in record.tensors}
        check_same(id_, writer.put_component(record.spec, own, record.refs))
    on_bytes(record.nbytes)


def _delta(source: Zoo, writer: Writer, id_: str, on_bytes: Callable[[int], None]) -> None:
    record = source.delta(id_)
    if not writer.has("deltas", id_):
        tensors = source.load_delta(id_)
        check_same(id_, writer.put_delta(record.spec, record.component, tensors))
    on_bytes(record.nbytes)
