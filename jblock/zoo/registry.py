"""Models and their versions: what is active, what was before, and under which names.

    chains/<name>/<version>.json    one version, immutable
    chains/<name>/model.json        the pointer: active version, digests, aliases and history

A version is there when the pointer lists it. Publishing writes the version first and then replaces the
pointer, so a crash in between leaves a file that nothing lists, which the next writer writes over. All of it
is one small file a model: adding one takes as long in a zoo of ten thousand as in an empty one.
"""

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import codec, lease
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
_VERSION_FILE = re.compile(r"([1-9][0-9]{0,8})\.json")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_ORIGIN = ("source", "revision", "license")  # of a chain's origin, what history tells
_FIELDS = {"active", "next", "versions", "lost", "aliases", "history"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The pointer of one model.

    Attributes:
      name: public name.
      active: the version that the name alone stands for; None: none.
      next: the number that the next version gets. Numbers are never given twice.
      versions: number -> digest of the version, "" in zoos of format 1.
      named: number -> the first digits of every id that the version names (`short_ids`), so that `gc` keeps
        them even where the version's own record cannot be read.
      lost: number -> digest of versions that lack something since damage was set aside. Adding the same
        content again brings a version back under its number.
      aliases: other names for a version, as in NAME@ALIAS -> number.
      history: what was done, oldest first: dicts of "time" (ISO, UTC), "user", "action" ("add", "activate",
        "rollback", "alias", "remove"), "version", "active" (afterwards), and for an addition "digest" and,
        as far as they are known, "source", "revision" and "license".
      state: what `Storage.pointer` gave.
    """

    name: str
    active: int | None = None
    next: int = 1
    versions: Mapping[int, str] = dataclasses.field(default_factory=dict)
    named: Mapping[int, str] = dataclasses.field(default_factory=dict)
    lost: Mapping[int, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, int] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    state: Any = None

    def did(self, action: str, version: int, **more: Any) -> "Model":
        """The model with one more line of history, about what it is now."""
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "user": lease.user(),
            "action": action,
            "version": version,
            "active": self.active,
            **{k: v for k, v in more.items() if v is not None},
        }
        return dataclasses.replace(self, history=(*self.history, line))

    def before(self) -> int | None:
        """The version that was active before the one that is, and is still there."""
        seen = [line.get("active") for line in self.history]
        for version in reversed(seen):
            if version != self.active and version in self.versions:
                return version
        return None

    def to_bytes(self) -> bytes:
        """The pointer's file."""
        versions = [
            {"version": v, "digest": d, "named": self.named.get(v, "")}
            for v, d in sorted(self.versions.items())
        ]
        data = {
            "active": self.active,
            "next": self.next,
            "versions": versions,
            "lost": [{"version": v, "digest": d} for v, d in sorted(self.lost.items())],
            "aliases": dict(self.aliases),
            "history": list(self.history),
        }
        return (canonical_json(data) + "\n").encode()

    @classmethod
    def from_bytes(cls, name: str, data: bytes, where: str, state: Any) -> "Model":
        """Inverse of `to_bytes`.

        Raises:
          NewerError: a field that this version does not know.
          DamagedError: it is something else.
        """
        found = codec.parse_json(data, where)
        unknown = sorted(found.keys() - _FIELDS)
        if unknown:
            raise NewerError(
                f"{where} has the field {unknown[0]!r}: a newer version of jblock wrote it; use that "
                "version"
            )
        try:
            versions = {_number(v["version"]): str(v["digest"]) for v in found["versions"]}
            named = {_number(v["version"]): str(v["named"]) for v in found["versions"]}
            lost = {_number(v["version"]): str(v["digest"]) for v in found["lost"]}
            aliases = {check_alias(a): _number(v) for a, v in found["aliases"].items()}
            active, following = found["active"], _number(found["next"])
            history = tuple(dict(line) for line in found["history"])
            if active is not None and active not in versions:
                raise ValueError(f"the active version {active!r} is none of {sorted(versions)}")
            if (
                max([*versions, *lost], default=0) >= following
                or not {*aliases.values()} <= versions.keys()
            ):
                raise ValueError("its numbers do not fit each other")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DamagedError(f"{where} is damaged ({e}): run 'fsck --repair'") from e
        return cls(
            name=name,
            active=active,
            next=following,
            versions=versions,
            named=named,
            lost=lost,
            aliases=aliases,
            history=history,
            state=state,
        )


def check_alias(alias: str) -> str:
    """Returns `alias` if it can stand behind the @ in place of a version.

    Raises:
      ZooError: it cannot.
    """
    if not isinstance(alias, str) or not _ALIAS.fullmatch(alias):
        raise ZooError(
            f"alias {alias!r} cannot be used: give a letter, then letters, digits, '_', '.' or '-', at "
            "most 64 in all"
        )
    return alias


def short_ids(chain: Chain) -> str:
    """The first eight digits of every id that a chain names, sorted, in one text."""
    others = (id_ for _, id_ in chain.folders)
    return "".join(sorted({i[:8] for i in (*chain.ids, *others)}))


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
        return Model(name=name, state=state)  # never published
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
        versions=dict.fromkeys(numbers, ""),
        state=state,
    )


def models(storage: Storage) -> list[str]:
    """Names under chains/, of models with an active version or without, sorted."""
    return [n for n in storage.names("chains") if _is_name(n)]


def version_files(storage: Storage, name: str) -> list[int]:
    """Numbers of the version files of a model, listed by its pointer or not, ascending."""
    found = (_VERSION_FILE.fullmatch(f) for f in storage.names(f"chains/{name}"))
    return sorted(int(m[1]) for m in found if m)


def chain(storage: Storage, name: str, version: int) -> Chain:
    """The record of one version, whether or not the pointer lists it.

    Raises:
      NotFoundError: there is none.
      DamagedError, UnreadableError, NewerError: it cannot be read.
    """
    path = path_of(name, version)
    return parse_chain(storage.read(path), name, version, f"{storage.location}/{path}")


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


def write(changes: Changes, model: Model) -> None:
    """Replaces the pointer of a model."""
    changes.point(f"chains/{model.name}/{POINTER}", model.to_bytes(), model.state)


def publish(storage: Storage, changes: Changes, chain: Chain, activate: bool) -> Chain:
    """Adds a version of a model and, unless told not to, makes it the active one; see `Zoo.publish`."""
    model = with_digests(storage, read(storage, chain.name))
    digest = chain.digest
    for version, known in model.versions.items():
        if known == digest and (same := _same(storage, chain, version)) is not None:
            if activate and model.active != version:
                model = dataclasses.replace(model, active=version)
                write(changes, model.did("activate", version))
            return same
    again = [v for v, d in model.lost.items() if d == digest]
    number = again[0] if again else model.next
    published = dataclasses.replace(chain, version=number)
    data = canonical_json(published.to_json()) + "\n"
    changes.put(path_of(chain.name, number), data.encode())
    model = dataclasses.replace(
        model,
        active=number if activate else model.active,
        next=max(model.next, number + 1),
        versions={**model.versions, number: digest},
        named={**model.named, number: short_ids(chain)},
        lost={v: d for v, d in model.lost.items() if v != number},
    )
    origin = {k: str(chain.origin[k]) for k in _ORIGIN if k in chain.origin}
    write(changes, model.did("add", number, digest=digest, **origin))
    return published


def with_digests(storage: Storage, model: Model) -> Model:
    """A model with the digests that format 1 did not keep; one of a damaged version stays empty."""
    versions, named = dict(model.versions), dict(model.named)
    for version, digest in versions.items():
        if not digest:
            with contextlib.suppress(ZooError):
                found = chain(storage, model.name, version)
                versions[version], named[version] = found.digest, short_ids(found)
    return dataclasses.replace(model, versions=versions, named=named)


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
    named = {v: n for v, n in model.named.items() if v in left}
    model = dataclasses.replace(model, active=active, versions=left, named=named, aliases=aliases)
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
    if text.isdecimal() and int(text) in model.versions:
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
        there = chain(storage, wanted.name, version)
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


def _number(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 10**9:
        raise ValueError(f"{value!r} is no number of a version")
    return value


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ZooError:
        return False
    return True
