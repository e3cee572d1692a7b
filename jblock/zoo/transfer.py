"""Copying models between zoos: only what the other one lacks is read and written."""

import dataclasses
from collections.abc import Callable

from jblock.zoo import edges
from jblock.zoo.records import Chain, DamagedError, NotFoundError, ZooError, split_version
from jblock.zoo.store import Zoo
from jblock.zoo.writer import Writer

_MOST_BASES = 32  # adapters on adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """One model that a copy put into the target.

    Attributes:
      chain: the version in the target.
      source_version: its number in the source.
      added: it is a new version there.
      active: it is the active version there.
      sent_bytes: tensor bytes that were new to the target.
    """

    chain: Chain
    source_version: int
    added: bool
    active: bool
    sent_bytes: int


def copy(
    source: Zoo,
    target: Zoo,
    name: str,
    version: int | str | None = None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    activate: bool = True,
    problems: list[str] | None = None,
) -> list[Copied]:
    """Copies one version of a model, and the base it is an adapter on, into another zoo.

    The copy becomes the active version of its name where it is so in the source; a base that comes along
    never does. Edges between what the other zoo has then go along; nothing is sent for an edge's sake alone.
    A copy that was interrupted leaves what it had moved in, which the next one finds there.

    Args:
      source: where the model is.
      target: where it goes.
      name: its name, in both.
      version: which version, or an alias; None: the active one.
      on_bytes: called with the tensor bytes of each component and delta once the target has it.
      activate: False: the copy does not become active either.
      problems: takes what is wrong with edges of the source, which are left out.

    Returns:
      What the target has now: bases first, the model itself last.

    Raises:
      ZooError: no such model, damage in the source, or a target that cannot be written.
    """
    wanted = source.chain(name, version)
    activate = activate and source.model(name).active == wanted.version
    found = _copy(source, target, wanted, on_bytes, activate, ())
    copy_edges(source, target, problems)
    return found


def _copy(
    source: Zoo,
    target: Zoo,
    chain: Chain,
    on_bytes: Callable[[int], None],
    activate: bool,
    above: tuple[str, ...],
) -> list[Copied]:
    at = f"{chain.name}@{chain.version}"
    if at in above or len(above) > _MOST_BASES:
        raise DamagedError(f"{' is on '.join((*above, at))}: bases that name each other; run fsck")
    source.check_chain(chain)
    source.check_whole(chain)
    copied: list[Copied] = []
    fields = chain.to_json() | {"version": 0}
    if chain.base is not None:
        base = source.chain(*split_version(chain.base))
        if chain.base_digest not in (None, base.digest):
            raise DamagedError(
                f"{at}: its base {chain.base} has another digest than it was made for"
            )
        copied = _copy(source, target, base, on_bytes, False, (*above, at))
        there = copied[-1].chain
        fields |= {"base": f"{there.name}@{there.version}", "base_digest": there.digest}
    before = target.versions(chain.name)
    with target.writer() as writer:
        for step in chain.steps:
            _component(source, writer, step.component, on_bytes, ())
            for id_ in step.deltas:
                _delta(source, writer, id_, on_bytes)
            writer.advance()
        for kind, folder in chain.folders:
            writer.put_files(kind, source.files(kind, folder))
        published = writer.publish(Chain.from_json(fields), activate)
    active = target.model(chain.name).active == published.version
    copied.append(
        Copied(
            chain=published,
            source_version=chain.version,
            added=published.version not in before,
            active=active,
            sent_bytes=writer.new_bytes,
        )
    )
    return copied


def copy_edges(source: Zoo, target: Zoo, problems: list[str] | None = None) -> int:
    """Copies the edges of which the target has all that they name; returns how many were new to it.

    Args:
      source: where they are.
      target: where they go.
      problems: takes what is wrong with edges of the source, which are left out.

    Raises:
      ZooError: the target cannot be written.
    """
    there = set(edges.edge_ids(target))
    found = []
    for edge in edges.edges(source, problems if problems is not None else []):
        try:
            if edge.chain is not None:
                edge = dataclasses.replace(edge, chain=_version_there(source, target, edge.chain))
            edges.check_edge(target, edge)
        except NotFoundError:
            continue  # it may come with another model
        except ZooError as e:
            if problems is not None:
                problems.append(str(e))
            continue
        if edge.id not in there:
            found.append(edge)
    if found:
        edges.put_edges(target, *found)
    return len(found)


def check_same(wanted: str, found: str) -> None:
    """Checks that what was read has the id it was asked for by.

    Raises:
      DamagedError: it has another.
    """
    if wanted != found:
        raise DamagedError(
            f"{wanted} holds other content than its id says ({found}): run fsck on the source"
        )


def _version_there(source: Zoo, target: Zoo, name_at: str) -> str:
    """The version of a model in the target that has the same digest."""
    name, version = split_version(name_at)
    digest = source.chain(name, version).digest
    for number in reversed(target.versions(name)):
        if target.chain(name, number).digest == digest:
            return f"{name}@{number}"
    raise NotFoundError(f"{target.storage.location} has no model {name_at}")


def _component(
    source: Zoo,
    writer: Writer,
    id_: str,
    on_bytes: Callable[[int], None],
    above: tuple[str, ...],
) -> None:
    if id_ in above:
        raise DamagedError(f"components {', '.join(above)} refer to each other; run fsck")
    record = source.component(id_)
    if not writer.has("components", id_):
        for owner, _ in record.refs.values():
            _component(source, writer, owner, lambda nbytes: None, (*above, id_))
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
