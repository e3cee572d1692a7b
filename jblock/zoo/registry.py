"""Models and their versions: what is active, what was before, and under which names.

    chains/<name>/<version>.json    one version, immutable
    chains/<name>/model.json        the pointer: active version, digests, aliases and history

A version is there when the pointer lists it. Publishing writes the version first and then replaces the
pointer, so a crash in between leaves a file that nothing lists, which the next writer writes over. All of it
is one small file a model: adding one takes as long in a zoo of ten thousand as in an empty one.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import codec
from jblock.zoo.pointer import Entry, Model, check_alias, check_record, entry_of
from jblock.zoo.records import (
    Chain,
    DamagedError,
    NewerError,
    NotFoundError,
    ZooError,
    check_name,
    split_version,
)
from jblock.zoo.storage import Changes, Storage

POINTER = "model.json"
_OLD_POINTER = "current"  # of zoos of format 1: the number of the active version
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_VERSION_FILE = re.compile(r"([1-9][0-9]{0,8})\.json")
_SHOWN = re.compile(rb'"version":\s*([1-9][0-9]{0,8})\b')
_ORIGIN = ("source", "revision", "license")  # of a chain's origin, what history tells


def path_of(name: str, version: int) -> str:
    """Name of the file of a version."""
    return f"chains/{name}/{version}.json"


def read(storage: Storage, name: str) -> Model:
    """The pointer of a model; an empty one where there is none.

    Raises:
      DamagedError, UnreadableError, NewerError: it cannot be read.
    """
    folder = f"chains/{check_name(name)}"
    data, state = storage.pointer(f"{folder}/{POINTER}")
    if data is not None:
        return Model.from_bytes(name, data, f"{storage.location}/{folder}/{POINTER}", state)
    try:
        text = storage.read(f"{folder}/{_OLD_POINTER}", 64)
    except NotFoundError:
        if version_files(storage, name) not in ([], [1]):
            raise DamagedError(
                f"{storage.location}/{folder}/{POINTER} is missing: run 'fsck --repair'"
            ) from None
        return Model(name=name, state=state)  # never published, or its first writer was killed
    numbers = version_files(storage, name)
    if not text.strip().isdigit() or int(text) not in numbers:
        raise DamagedError(
            f"{storage.location}/{folder}/{_OLD_POINTER} does not name the active version: run "
            "'fsck --repair'"
        )
    return Model(
        name=name,
        active=int(text),
        next=max(numbers) + 1,
        versions=blank(numbers),
        state=state,
    )


def read_all(storage: Storage, names: Sequence[str]) -> Iterator[tuple[str, Model | ZooError]]:
    """The pointers of models, read together, or why one cannot be read; removed ones are left out."""
    paths = {f"chains/{name}/{POINTER}": name for name in names}
    found = storage.pointers(paths)
    for path, name in paths.items():
        data = found.get(path)
        if isinstance(data, ZooError):
            yield name, data
            continue
        try:
            if data is None:
                model = read(storage, name)  # of format 1
            else:
                model = Model.from_bytes(name, data, f"{storage.location}/{path}")
        except ZooError as e:
            yield name, e
            continue
        if model.versions:
            yield name, model


def blank(numbers: Sequence[int]) -> dict[int, Entry]:
    """Versions of which the pointer says nothing."""
    return {number: Entry(version=number, digest="") for number in numbers}


def models(storage: Storage) -> list[str]:
    """Names under chains/, of models with an active version or without, sorted."""
    return [n for n in storage.names("chains") if _is_name(n)]


def version_files(storage: Storage, name: str) -> list[int]:
    """Numbers of the version files of a model, listed by its pointer or not, ascending."""
    found = (_VERSION_FILE.fullmatch(f) for f in storage.names(f"chains/{name}"))
    return sorted(int(m[1]) for m in found if m)


def record(storage: Storage, name: str, version: int) -> tuple[Chain, bytes]:
    """The record of one version, whether or not the pointer lists it, and its file.

    Raises:
      NotFoundError: there is none.
      DamagedError, UnreadableError, NewerError: it cannot be read.
    """
    path = path_of(name, version)
    data = storage.read(path)
    return parse_chain(data, name, version, f"{storage.location}/{path}"), data


def chain(storage: Storage, model: Model, version: int) -> Chain:
    """One version that a pointer lists, as it was published.

    Raises:
      NotFoundError: there is none.
      DamagedError, UnreadableError, NewerError: it cannot be read, or is another than was published.
    """
    found, data = record(storage, model.name, version)
    check_record(model.versions[version], found, data)
    return found


def parse_chain(data: bytes, name: str, version: int, where: str) -> Chain:
    """The record of one version from the bytes of its file; raises as `chain` does."""
    try:
        found = Chain.from_json(codec.parse_json(data, where))
    except NewerError as e:
        raise NewerError(f"{where}: {e}") from e
    except DamagedError as e:
        raise DamagedError(f"{where}: {e}") from e
    if (found.name, found.version) != (name, version):
        raise DamagedError(
            f"{where} describes {found.name}@{found.version}: the zoo is damaged; run fsck"
        )
    return found


def rebuilt(storage: Storage, name: str) -> Model:
    """A pointer made of a model's version files, in place of a damaged one. Numbers that the damaged one
    still shows are not given again."""
    numbers = version_files(storage, name)
    data, state = storage.pointer(f"chains/{name}/{POINTER}")
    seen = [int(m[1]) for m in _SHOWN.finditer(data or b"")]
    model = Model(
        name=name, next=max([*numbers, *seen], default=0) + 1, versions=blank(numbers), state=state
    )
    return completed(storage, model)


def write(changes: Changes, model: Model) -> None:
    """Replaces the pointer of a model."""
    changes.point(f"chains/{model.name}/{POINTER}", model.to_bytes(), model.state)


def publish(storage: Storage, changes: Changes, chain: Chain, activate: bool) -> Chain:
    """Adds a version of a model and, unless told not to, makes it the active one; see `Zoo.publish`."""
    model = completed(storage, read(storage, chain.name))
    digest = chain.digest
    for version, entry in model.versions.items():
        if entry.digest == digest and (same := _same(storage, chain, version)) is not None:
            if activate and model.active != version:
                model = dataclasses.replace(model, active=version)
                write(changes, model.did("activate", version))
            return same
    again = [v for v, d in model.lost.items() if d == digest]
    number = again[0] if again else model.next
    published = dataclasses.replace(chain, version=number)
    data = (canonical_json(published.to_json()) + "\n").encode()
    changes.put(path_of(chain.name, number), data)
    entry = entry_of(published, data)
    model = dataclasses.replace(
        model,
        active=number if activate else model.active,
        next=max(model.next, number + 1),
        versions={**model.versions, number: entry},
        lost={v: d for v, d in model.lost.items() if v != number},
    )
    origin = {k: v for k, v in entry.origin.items() if k in _ORIGIN}
    write(changes, model.did("add", number, digest=digest, **origin))
    return published


def completed(storage: Storage, model: Model) -> Model:
    """A model with the entries that earlier formats did not keep; one of a damaged version stays as it is."""
    if all(entry.record for entry in model.versions.values()):
        return model
    versions = dict(model.versions)
    for version, entry in versions.items():
        if not entry.record:
            with contextlib.suppress(ZooError):
                found, data = record(storage, model.name, version)
                check_record(entry, found, data)
                versions[version] = entry_of(found, data)
    return dataclasses.replace(model, versions=versions)


def activate(changes: Changes, model: Model, version: int, action: str = "activate") -> Model:
    """Makes one of its versions the active one."""
    model = dataclasses.replace(model, active=version).did(action, version)
    write(changes, model)
    return model


def alias(changes: Changes, model: Model, name: str, version: int | None) -> Model:
    """Lets an alias name a version; None takes the alias away."""
    aliases = {k: v for k, v in model.aliases.items() if k != check_alias(name)}
    if version is not None:
        aliases[name] = version
    about = version if version is not None else model.aliases.get(name, 0)
    model = dataclasses.replace(model, aliases=aliases).did("alias", about, alias=name)
    write(changes, model)
    return model


def remove(storage: Storage, changes: Changes, model: Model, versions: list[int]) -> Model:
    """Takes versions out of a model; its numbers and its history stay."""
    left = {v: d for v, d in model.versions.items() if v not in versions}
    active = model.active if model.active in left else None
    aliases = {a: v for a, v in model.aliases.items() if v in left}
    model = dataclasses.replace(model, active=active, versions=left, aliases=aliases)
    for version in versions:
        model = model.did("remove", version)
    write(changes, model)
    for version in versions:
        if storage.exists(path_of(model.name, version)):
            changes.remove(path_of(model.name, version))
    return model


def resolve(model: Model, text: str) -> int:
    """The version that stands behind the @: a number or an alias.

    Raises:
      NotFoundError: the model has no such version or alias.
    """
    if _NUMBER.fullmatch(text) and int(text) in model.versions:
        return int(text)
    if text in model.aliases:
        return model.aliases[text]
    raise unknown_version(model, text)


def unknown_version(model: Model, text: str) -> NotFoundError:
    """The error for a version or alias that a model does not have; it names those that it has."""
    known = ", ".join([*map(str, sorted(model.versions)), *sorted(model.aliases)]) or "none"
    return NotFoundError(
        f"no version {model.name}@{text}: it was removed or never added; known: {known}"
    )


def _same(storage: Storage, wanted: Chain, version: int) -> Chain | None:
    """The record of a version if it says the same as another one, stored in this way or that."""
    try:
        there, _ = record(storage, wanted.name, version)
    except ZooError:
        return None  # damaged: the new one gets a number of its own
    pair = []
    for one in (wanted, there):
        # A base may have another number in another zoo; its digest says which it is.
        base = None if one.base is None else split_version(one.base)[0]
        plain = dataclasses.replace(
            one, version=0, steps=(), whole={}, origin={}, base=None, base_digest=None
        )
        pair.append([json.loads(canonical_json(plain.to_json())), base])
    digests = {one.base_digest for one in (wanted, there)} - {None}
    return there if pair[0] == pair[1] and len(digests) < 2 else None


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ZooError:
        return False
    return True
