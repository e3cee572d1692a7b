"""What the zoo stores beside tensors: component, delta and chain records. Plain data, no I/O."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jblock.blocks.delta_spec import DeltaSpec
from jblock.blocks.spec import ComponentSpec
from jblock.blocks.spec_json import canonical_json

POLICIES = ("exact", "near", "adaptive")
"""What a chain promises: identical components only; substitutes measured to be nearly equal, or lossy codecs;
substitutes with a measured cost. Each takes in those before it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*")


class ZooError(ValueError):
    """What the zoo refuses: says what was given, what was expected and what to do."""


class NotFoundError(ZooError):
    """Something named by its id is not in the zoo: never added, or removed in the meantime."""


class DamagedError(ZooError):
    """What was read is not what was written: its hash, its form or its size is wrong."""


class UnreadableError(ZooError):
    """A file is there and cannot be read (permissions, a network that is away): it may be sound."""


class NewerError(ZooError):
    """A record has fields or kinds that this version does not know: a newer version wrote it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One stored tensor: `shape`, and `dtype` by its numpy name ("bfloat16", "float32", ...)."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentRecord:
    """One immutable component.

    Attributes:
      id: sha256 (hex) over the canonical spec, references and tensor bytes.
      spec: dimensions and options.
      tensors: the tensors the component owns, by name.
      refs: tensor name -> (component id, tensor name) it is tied to; those are not stored twice.
      nbytes: bytes of the owned tensors.
    """

    id: str
    spec: ComponentSpec
    tensors: dict[str, TensorRecord]
    refs: dict[str, tuple[str, str]]
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaRecord:
    """One immutable delta; `component` is the id of the component it applies to."""

    id: str
    spec: DeltaSpec
    component: str
    tensors: dict[str, TensorRecord]
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a chain: a component id and the ordered delta ids that ride on it.

    Steps `fused_with_previous` run together with the one before and are never served apart from it: an
    expert with its router, a parallel ffn with its attention.
    """

    component: str
    deltas: tuple[str, ...] = ()
    fused_with_previous: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the step. Records have always called the last field "joined"."""
        return {
            "component": self.component,
            "deltas": list(self.deltas),
            "joined": self.fused_with_previous,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Step":
        """Inverse of `to_json`; KeyError or TypeError where it is not one, NewerError for a field that this
        version does not know."""
        deltas = data["deltas"]
        unknown = data.keys() - _STEP_FIELDS
        if unknown:
            raise NewerError(
                f"a step has the field {min(unknown)!r}: a newer version of jblock wrote it; use that version"
            )
        if not isinstance(deltas, list | tuple):
            raise TypeError(f"step {str(dict(data))[:120]} has something else than ids")
        key = (data["component"], tuple(deltas), data.get("joined", False) is True)
        known = _STEPS.get(key)
        if known is None:
            if not all(_is_id(i) for i in (key[0], *key[1])):
                raise TypeError(f"step {str(dict(data))[:120]} has something else than ids")
            if len(_STEPS) >= _MOST_STEPS:
                _STEPS.clear()
            known = cls(component=key[0], deltas=key[1], fused_with_previous=key[2])
            _STEPS[key] = known
        return known


_STEP_FIELDS = {"component", "deltas", "joined"}
# Steps that were read and checked: models of one zoo have most of theirs in common.
_STEPS: dict[tuple[str, tuple[str, ...], bool], Step] = {}
_MOST_STEPS = 1 << 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """One immutable version of one public model name.

    Attributes:
      name: public model name.
      version: 1, 2, ...; given by the zoo on publishing, and never given twice.
      family: name of the architecture ("llama", ...), for export.
      steps: embedding, then the layers, then norm, unembedding.
      tokenizer: tokenizer id, or None when the source had none (token ids only).
      max_position: longest sequence in tokens the model was made for.
      vocab_size: rows of the embedding.
      eos_token_ids: ids that end a generation.
      bos_token_id: id the tokenizer puts first, if any.
      base: "name@version" of the chain an adapter was attached to, else None.
      base_digest: digest of that version, whatever number it has in another zoo; None in records from
        before versions had digests.
      generation: the source's generation_config, as far as it is about sampling defaults.
      source: the source's config.json as it was (for export and inspection).
      adapter: the adapter's adapter_config.json as it was; empty for a chain without one.
      tokenizer_files: id of the folder (of "sources") with the files that came with the tokenizer, its chat
        template among them, and how its tokenizer.json was written. None in records from before the two were
        apart: there the tokenizer's own folder has them.
      source_files: id of the folder with the source's small files byte by byte, and the headers of
        its weight files: what an export needs to write the same files again.
      policy: one of POLICIES: how far what it computes may be from the model it stands for. Anything
        but "exact" is served only to who asks for it.
      derived: how the chain was made from another one: "chain" ("name@version"), "command", its
        settings, and what it cost; empty for a chain that was converted.
      origin: where a converted chain comes from: "source" (a path, or a name on the Hub), "revision" (the
        commit), "license", "date" (UTC); what is not known is left out. No part of what a version is:
        the same model from another place is no new one.
      whole: index of a step, as text -> id of the one component that its component and deltas make. A
        converter stores a component that differs from one of the zoo in biases and norms as a delta on
        that; the digest covers the whole, and so does not depend on what was converted before.
    """

    name: str
    version: int = 0
    family: str
    steps: tuple[Step, ...]
    tokenizer: str | None
    max_position: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    base: str | None = None
    base_digest: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer_files: str | None = None
    source_files: str | None = None
    policy: str = "exact"
    derived: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 (hex) over all that decides what the model answers: family, steps with their deltas in
        order, tokenizer, token ids, lengths, sampling defaults and policy. Not its name or number."""
        steps: list[Any] = [step.to_json() for step in self.steps]
        for index, id_ in self.whole.items():
            steps[int(index)] |= {"component": id_, "deltas": []}
        fields = ("family", "tokenizer", "max_position", "vocab_size", "bos_token_id")
        covered = {name: getattr(self, name) for name in fields} | {
            "steps": steps,
            "eos_token_ids": list(self.eos_token_ids),
            "generation": self.generation,
            "policy": self.policy,
        }
        return hashlib.sha256(canonical_json(covered).encode()).hexdigest()

    @property
    def invocation(self) -> tuple[int, ...]:
        """Of an activated LoRA, the tokens from whose last occurrence in a prompt on its deltas act."""
        tokens = self.adapter.get("alora_invocation_tokens")
        return tuple(tokens) if isinstance(tokens, list) else ()

    @property
    def ids(self) -> list[str]:
        """The distinct ids of its components and deltas, in order."""
        return list(dict.fromkeys(i for s in self.steps for i in (s.component, *s.deltas)))

    @property
    def folders(self) -> tuple[tuple[str, str], ...]:
        """Kind and id of the folders of small files that it names."""
        named = (
            ("tokenizers", self.tokenizer),
            ("sources", self.tokenizer_files),
            ("sources", self.source_files),
        )
        return tuple((kind, id_) for kind, id_ in named if id_ is not None)

    def derive(
        self, name: str, steps: Sequence[Step], policies: Sequence[str], how: Mapping[str, Any]
    ) -> "Chain":
        """A chain of another name made of this one: not what its source holds, so it exports to nothing.

        Args:
          name: of the new one.
          steps: its own.
          policies: it has the widest of them and this one's.
          how: it was made.
        """
        return dataclasses.replace(
            self,
            name=name,
            version=0,
            steps=tuple(steps),
            base=None,
            base_digest=None,
            adapter={},
            source_files=None,
            policy=max(self.policy, *policies, key=POLICIES.index),
            derived={"chain": f"{self.name}@{self.version}", **how},
            origin={},
            whole={},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the chain."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {
            "steps": [step.to_json() for step in self.steps],
            "eos_token_ids": list(self.eos_token_ids),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Chain":
        """Inverse of `to_json`.

        Raises:
          NewerError: a field that this version does not know.
          DamagedError: fields missing or of a wrong type, or numbers that are none of a model.
        """
        unknown = sorted(data.keys() - _CHAIN_FIELDS)
        if unknown:
            raise NewerError(
                f"chain record has the field {unknown[0]!r}: a newer version of jblock wrote it; use "
                "that version"
            )
        for field, (check, expected) in _CHAIN_CHECKS.items():
            if field in data and not check(data[field]):
                raise DamagedError(
                    f"chain record: {field} is {str(data[field])[:80]!r}, expected {expected}: the zoo "
                    "is damaged; run fsck"
                )
        try:
            fields = dict(data)
            fields["steps"] = tuple(Step.from_json(s) for s in fields["steps"])
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
            chain = cls(**fields)
        except (TypeError, KeyError, AttributeError) as e:
            raise DamagedError(f"chain record has missing or malformed fields: {e}") from e
        if not all(0 <= id_ < chain.vocab_size for id_ in chain.eos_token_ids):
            raise DamagedError(
                f"chain record: eos_token_ids {list(chain.eos_token_ids)} are not all under vocab_size "
                f"{chain.vocab_size}: the zoo is damaged; run fsck"
            )
        if not all(_INDEX.fullmatch(i) and int(i) < len(chain.steps) for i in chain.whole):
            raise DamagedError("chain record: whole names a step that is not there; run fsck")
        return chain


_CHAIN_FIELDS = {f.name for f in dataclasses.fields(Chain)}
_HEX = re.compile(r"[0-9a-f]{64}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
VERSION_NAME = re.compile(rf"({_NAME.pattern})@([1-9][0-9]{{0,8}})")
"""name@version."""


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_json(value: Any) -> bool:
    return isinstance(value, dict)


def _is_derived(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    chain, packed = value.get("chain", "x@1"), value.get("packed", {})
    return (
        isinstance(chain, str)
        and VERSION_NAME.fullmatch(chain) is not None
        and isinstance(value.get("command", ""), str)
        and isinstance(packed, dict)
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# Field -> what it has to be, and in words.
_CHAIN_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str), "a name"),
    "version": (lambda v: type(v) is int and 0 <= v < 2**31, "a number"),
    "family": (lambda v: isinstance(v, str) and v.isascii() and v.isidentifier(), "a name"),
    "steps": (lambda v: isinstance(v, list | tuple), "a list"),
    "tokenizer": (_optional(_is_id), "an id or null"),
    "tokenizer_files": (_optional(_is_id), "an id or null"),
    "source_files": (_optional(_is_id), "an id or null"),
    "max_position": (_is_number, "a whole number, at least 1"),
    "vocab_size": (_is_number, "a whole number, at least 1"),
    "eos_token_ids": (
        lambda v: isinstance(v, list | tuple) and all(type(i) is int for i in v),
        "a list of whole numbers",
    ),
    "bos_token_id": (_optional(lambda v: type(v) is int and v >= 0), "a whole number or null"),
    "base": (
        _optional(lambda v: isinstance(v, str) and VERSION_NAME.fullmatch(v) is not None),
        "NAME@VERSION or null",
    ),
    "base_digest": (_optional(_is_id), "a digest or null"),
    "generation": (_is_json, "an object"),
    "source": (_is_json, "an object"),
    "adapter": (_is_json, "an object"),
    "derived": (
        _is_derived,
        "an object whose chain is NAME@VERSION, command text and packed an object",
    ),
    "policy": (lambda v: v in POLICIES, f"one of {', '.join(POLICIES)}"),
    "origin": (_is_json, "an object"),
    "whole": (
        lambda v: isinstance(v, dict) and all(_is_id(i) for i in v.values()),
        "an object of ids",
    ),
}


def printable(text: str) -> str:
    """`text` for a terminal and in one line: control characters, and bytes of paths that are no Unicode, as
    escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def split_version(text: str) -> tuple[str, int]:
    """The name and the number of "name@version".

    Raises:
      ZooError: it is something else.
    """
    match = VERSION_NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ZooError(f"{text!r} is not NAME@VERSION")
    return match[1], int(match[2])


def check_name(name: str) -> str:
    """Returns `name` if it can be a public model name.

    Raises:
      ZooError: anything but letters, digits, '_', '-' and single inner dots, or over 128 long.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 128:
        raise ZooError(
            f"name {name!r} cannot be used: give 1 to 128 letters, digits, '_' or '-', with single "
            "dots only between them (no slash, no leading dot)"
        )
    return name
