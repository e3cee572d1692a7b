"""What the zoo stores beside tensors: component, delta and chain records. Plain data, no I/O."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jblock.blocks.delta_spec import DeltaSpec
from jblock.blocks.spec import ComponentSpec

POLICIES = ("exact", "near", "adaptive")
"""What a chain promises: identical components only; substitutes measured to be nearly equal, or lossy codecs;
substitutes with a measured cost. Each takes in those before it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


class ZooError(ValueError):
    """What the zoo refuses: says what was given, what was expected and what to do."""


class NotFoundError(ZooError):
    """Something named by its id is not in the zoo: never added, or removed in the meantime."""


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
        """Inverse of `to_json`; KeyError or TypeError where it is not one."""
        return cls(
            component=data["component"],
            deltas=tuple(data["deltas"]),
            fused_with_previous=data.get("joined", False) is True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """One immutable version of one public model name.

    Attributes:
      name: public model name.
      version: 1, 2, ...; given by the zoo on publishing.
      family: name of the architecture ("llama", ...), for export.
      steps: embedding, then the layers, then norm, unembedding.
      tokenizer: tokenizer id, or None when the source had none (token ids only).
      max_position: longest sequence in tokens the model was made for.
      vocab_size: rows of the embedding.
      eos_token_ids: ids that end a generation.
      bos_token_id: id the tokenizer puts first, if any.
      base: "name@version" of the chain an adapter was attached to, else None.
      generation: the source's generation_config, as far as it is about sampling defaults.
      source: the source's config.json as it was (for export and inspection).
      adapter: the adapter's adapter_config.json as it was; empty for a chain without one.
      source_files: id of the folder with the source's small files byte by byte, and the headers of
        its weight files: what an export needs to write the same files again.
      policy: one of POLICIES: how far what it computes may be from the model it stands for. Anything
        but "exact" is served only to who asks for it.
      derived: how the chain was made from another one: "chain" ("name@version"), "command", its
        settings, and what it cost; empty for a chain that was converted.
      origin: where a converted chain comes from: "source" (a path, or a name on the Hub), "revision" (the
        commit), "license", "date" (UTC); what is not known is left out. No part of what a version is:
        the same model from another place is no new one.
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
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    source_files: str | None = None
    policy: str = "exact"
    derived: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

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
            adapter={},
            source_files=None,
            policy=max(self.policy, *policies, key=POLICIES.index),
            derived={"chain": f"{self.name}@{self.version}", **how},
            origin={},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the chain."""
        return dataclasses.asdict(self) | {"steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Chain":
        """Inverse of `to_json`.

        Raises:
          ZooError: fields missing or unknown, or numbers that are none of a model.
        """
        fields = dict(data)
        try:
            fields["steps"] = tuple(Step.from_json(s) for s in fields["steps"])
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
            chain = cls(**fields)
        except (TypeError, KeyError) as e:
            raise ZooError(f"chain record has missing or unknown fields: {e}") from e
        if chain.policy not in POLICIES or not isinstance(chain.derived, dict):
            raise ZooError(
                f"chain record: policy is {chain.policy!r}: the zoo is damaged; run fsck"
            )
        for field in ("max_position", "vocab_size"):
            value = fields[field]
            if type(value) is not int or not 1 <= value < 2**31:
                raise ZooError(f"chain record: {field} is {value!r}: the zoo is damaged; run fsck")
        for id_ in chain.eos_token_ids:
            if type(id_) is not int or not 0 <= id_ < chain.vocab_size:
                raise ZooError(
                    f"chain record: eos_token_ids has {id_!r}: the zoo is damaged; run fsck"
                )
        return chain


def check_name(name: str) -> str:
    """Returns `name` if it can be a public model name.

    Raises:
      ZooError: anything but letters, digits, '_', '-' and single inner dots, or over 128 long.
    """
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise ZooError(
            f"name {name!r} cannot be used: give 1 to 128 letters, digits, '_' or '-', with single "
            "dots only between them (no slash, no leading dot)"
        )
    return name
