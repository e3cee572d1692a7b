"""Component specs to and from JSON: what is stored beside a component's tensors and hashed with them."""

import dataclasses
import json
from typing import Any

from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.rope_spec import RopeSpec, SpecError
from jblock.blocks.spec import KINDS, ComponentSpec


def spec_to_json(spec: ComponentSpec) -> dict[str, Any]:
    """Plain JSON of a spec. Fields at their default are left out, so that a field added later does
    not change the hash of what was stored before it existed."""
    return {"kind": spec.kind, **fields_to_json(spec)}


def fields_to_json(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default, nested ones too."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and item == field.default:
            continue
        stored = field.metadata.get("stored_as", field.name)
        out[stored] = fields_to_json(item) if dataclasses.is_dataclass(item) else item
    return out


def spec_from_json(data: dict[str, Any]) -> ComponentSpec:
    """Inverse of `spec_to_json`.

    Raises:
      SpecError: an unknown kind, or fields that do not fit it.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    try:
        if kind not in KINDS:
            raise SpecError(f"component kind {kind!r} is not known; known: {', '.join(KINDS)}")
        if fields.get("rope") is not None:
            rope = dict(fields["rope"])
            if "factors" in rope:
                rope["factors"] = tuple(rope["factors"])
            fields["rope"] = RopeSpec(**rope)
        if fields.get("quant") is not None:
            fields["quant"] = QuantSpec(**fields["quant"])
        for field in dataclasses.fields(KINDS[kind]):
            stored = field.metadata.get("stored_as", field.name)
            if stored != field.name and stored in fields:
                fields[field.name] = fields.pop(stored)
        return KINDS[kind](**fields)
    except (TypeError, KeyError, AttributeError) as e:
        raise SpecError(f"spec of kind {kind!r} has missing or unknown fields: {e}") from e


def canonical_json(data: Any) -> str:
    """One spelling per value: sorted keys, no spaces. What hashes and signatures are taken over."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
