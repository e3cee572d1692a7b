"""The pointer of a model, `chains/<name>/model.json`: its versions, which is active, and what was done.

It says of each version what a list of models shows, and has the hash of its record. So a list reads pointers
alone, and a record that is not as it was published is found out, whichever of its fields is another: `fsck`
compares the two. What is active, the aliases, the history and what was lost stand in the pointer alone; they
are bookkeeping that nothing can check but for its form.
"""

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import codec, lease
from jblock.zoo.records import Chain, DamagedError, NewerError, ZooError, printable

NAMED = 16  # digits of each id in `Entry.named`
ORIGIN = ("source", "revision", "license", "date")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_Number = Annotated[int, msgspec.Meta(ge=1, lt=10**9)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pointer says of one version.

    Attributes:
      version: its number.
      digest: of the chain; "" in zoos of format 1.
      record: sha256 (hex) of its file. Entries from before it was kept have "", and of what follows at most
        `named`.
      named: the first `NAMED` digits (eight, where `record` is "") of every id that it names, sorted, in one
        text: what it shares with others, and what `gc` keeps where its own record cannot be read.
      family, base, policy: the chain's.
      made_from: "name@version" of the chain that it was derived from, if it was.
      origin: those of ORIGIN that are known.
    """

    version: _Number
    digest: str
    record: str = ""
    named: str = ""
    family: str = ""
    base: str | None = None
    made_from: str | None = None
    policy: str = ""
    origin: dict[str, str] = {}


class _Lost(msgspec.Struct, frozen=True):
    version: _Number
    digest: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    active: _Number | None
    next: _Number
    versions: list[Entry]
    lost: list[_Lost]
    aliases: dict[str, _Number]
    history: list[dict[str, str | int | None]]


_DECODER = msgspec.json.Decoder(_File)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The pointer of one model.

    Attributes:
      name: public name.
      active: the version that the name alone stands for; None: none.
      next: the number that the next version gets. Numbers are never given twice.
      versions: by number.
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
    versions: Mapping[int, Entry] = dataclasses.field(default_factory=dict)
    lost: Mapping[int, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, int] = dataclasses.field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    state: Any = None

    def did(self, action: str, version: int, **more: str | None) -> "Model":
        """The model with one more line of history, about what it is now."""
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "user": lease.user(),
            "action": action,
            "version": version,
            "active": self.active,
            **{k: printable(v) for k, v in more.items() if v is not None},
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
        data = {
            "active": self.active,
            "next": self.next,
            "versions": [msgspec.to_builtins(e) for _, e in sorted(self.versions.items())],
            "lost": [{"version": v, "digest": d} for v, d in sorted(self.lost.items())],
            "aliases": dict(self.aliases),
            "history": list(self.history),
        }
        return (canonical_json(data) + "\n").encode()

    @classmethod
    def from_bytes(cls, name: str, data: bytes, where: str, state: Any = None) -> "Model":
        """Inverse of `to_bytes`.

        Raises:
          NewerError: a field that this version does not know.
          DamagedError: it is something else.
        """
        codec.check_values(data, where)
        try:
            found = _DECODER.decode(data)
            versions = {e.version: e for e in found.versions}
            lost = {e.version: e.digest for e in found.lost}
            if found.active is not None and found.active not in versions:
                raise ValueError(f"the active version {found.active} is none of {sorted(versions)}")
            if (
                len(versions) < len(found.versions)
                or max([*versions, *lost], default=0) >= found.next
                or not {*found.aliases.values()} <= versions.keys()
            ):
                raise ValueError("its numbers do not fit each other")
            for alias in found.aliases:
                check_alias(alias)
        except (ValueError, RecursionError) as e:
            _check_known(codec.parse_json(data, where), where)
            raise DamagedError(f"{where} is damaged ({e}): run 'fsck --repair'") from e
        return cls(
            name=name,
            active=found.active,
            next=found.next,
            versions=versions,
            lost=lost,
            aliases=found.aliases,
            history=tuple(found.history),
            state=state,
        )


def entry_of(chain: Chain, data: bytes) -> Entry:
    """What a pointer says of a version.

    Args:
      chain: the version, with its number.
      data: its file.
    """
    ids = (*chain.ids, *(id_ for _, id_ in chain.folders))
    made_from = chain.derived.get("chain")
    return Entry(
        version=chain.version,
        digest=chain.digest,
        record=hashlib.sha256(data).hexdigest(),
        named="".join(sorted({i[:NAMED] for i in ids})),
        family=chain.family,
        base=chain.base,
        made_from=None if made_from is None else str(made_from),
        policy=chain.policy,
        origin={k: printable(str(chain.origin[k])) for k in ORIGIN if k in chain.origin},
    )


def check_record(entry: Entry, chain: Chain, data: bytes) -> None:
    """Checks that a version's file is the one that was published.

    Args:
      entry: what the pointer says of it.
      chain: what the file says.
      data: the file.

    Raises:
      DamagedError: it is another.
    """
    if entry.record and hashlib.sha256(data).hexdigest() == entry.record:
        return
    what = "record" if entry.record else ""
    if entry.digest not in ("", chain.digest):
        what = "digest"
    if what:
        raise DamagedError(
            f"{chain.name}@{chain.version} has another {what} than when it was published: its record was "
            "changed; run 'fsck --repair' and convert the model again"
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


def _check_known(found: Mapping[str, Any], where: str) -> None:
    """Raises NewerError where a pointer has a field that this version does not know."""
    entries = found.get("versions")
    unknown = found.keys() - {f.name for f in msgspec.structs.fields(_File)}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            unknown |= entry.keys() - {f.name for f in msgspec.structs.fields(Entry)}
    if unknown:
        raise NewerError(
            f"{where} has the field {min(unknown)!r}: a newer version of jblock wrote it; use that version"
        )
