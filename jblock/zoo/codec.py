"""Records to and from the zoo's JSON files. Everything read is checked before it is believed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jblock.blocks.compressed_spec import BitDeltaSpec, LowRankSpec
from jblock.blocks.delta_spec import DeltaSpec, delta_from_json, delta_to_json
from jblock.blocks.spec import (
    ComponentSpec,
    SpecError,
    spec_from_json,
    spec_to_json,
    stored_dtype,
)
from jblock.zoo import ids
from jblock.zoo.records import ComponentRecord, DeltaRecord, TensorRecord, ZooError

_ID = re.compile(r"[0-9a-f]{64}")
_DAMAGE = (SpecError, ZooError, KeyError, TypeError, ValueError, AttributeError)


def check_id(id: str) -> str:
    """Returns `id` if it is a content id.

    Raises:
      ZooError: anything but 64 lower-case hexadecimal digits.
    """
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise ZooError(f"{id!r} is no id: an id is 64 hexadecimal digits")
    return id


def component_header(record: ComponentRecord) -> dict[str, Any]:
    """What a component's id covers beside its tensors."""
    refs = {name: list(target) for name, target in record.refs.items()}
    return {"spec": spec_to_json(record.spec), "refs": refs}


def delta_header(record: DeltaRecord) -> dict[str, Any]:
    """What a delta's id covers beside its tensors."""
    return {"spec": delta_to_json(record.spec), "component": record.component}


def component_record(id: str, data: dict[str, Any]) -> ComponentRecord:
    """A component's record from its spec.json.

    Raises:
      ZooError: fields missing, malformed, or not fitting each other.
    """
    try:
        spec = spec_from_json(data["spec"])
        tensors = _tensors(data)
        refs = {str(n): (check_id(c), str(t)) for n, (c, t) in data["refs"].items()}
        _check_fit(tensors, refs, spec.tensors())
        check_dtypes(spec, tensors)
        return ComponentRecord(
            id=id, spec=spec, tensors=tensors, refs=refs, nbytes=_nbytes(data, tensors)
        )
    except _DAMAGE as e:
        raise ZooError(f"component {id}: spec.json is damaged ({e}); run fsck") from e


def delta_record(id: str, data: dict[str, Any]) -> DeltaRecord:
    """A delta's record from its spec.json. Its shapes are checked where its component is known.

    Raises:
      ZooError: fields missing, malformed, or not fitting each other.
    """
    try:
        spec = delta_from_json(data["spec"])
        tensors = _tensors(data)
        check_dtypes(spec, tensors)
        return DeltaRecord(
            id=id,
            spec=spec,
            component=check_id(data["component"]),
            tensors=tensors,
            nbytes=_nbytes(data, tensors),
        )
    except _DAMAGE as e:
        raise ZooError(f"delta {id}: spec.json is damaged ({e}); run fsck") from e


def record_json(
    header: Mapping[str, Any], tensors: Mapping[str, TensorRecord], nbytes: int
) -> dict[str, Any]:
    """The spec.json of a component or delta."""
    return {**header, "tensors": ids.records_json(tensors), "nbytes": nbytes}


def check_shapes(
    kind: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks names and shapes of tensors against what a spec wants.

    Raises:
      ZooError: a tensor is missing, too many, or of another shape.
    """
    if given.keys() != expected.keys():
        raise ZooError(
            f"{kind}: missing tensors {sorted(expected.keys() - given.keys())}, surplus "
            f"{sorted(given.keys() - expected.keys())}"
        )
    for name, shape in expected.items():
        if tuple(given[name]) != tuple(shape):
            raise ZooError(
                f"{kind}: tensor {name!r} has shape {list(given[name])}, expected {list(shape)}"
            )


def check_dtypes(spec: ComponentSpec | DeltaSpec, tensors: Mapping[str, TensorRecord]) -> None:
    """Checks that whole numbers are where a spec wants them, and floats everywhere else.

    Raises:
      ZooError: a tensor of a dtype that its spec does not take.
    """
    for name, tensor in tensors.items():
        if isinstance(spec, (LowRankSpec, BitDeltaSpec)):
            wanted: str | None = spec.dtype(name)
        else:
            wanted = stored_dtype(spec, name)
        if tensor.dtype not in (ids.FLOATS if wanted is None else (wanted,)):
            raise ZooError(
                f"{spec.kind}: tensor {name!r} is {tensor.dtype}, expected "
                f"{wanted or ' or '.join(ids.FLOATS)}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the zoo.

    Raises:
      ZooError: no such file, or something else in it.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ZooError(f"{path} cannot be read ({e}): the zoo is damaged; run fsck") from e
    if not isinstance(data, dict):
        raise ZooError(f"{path} holds {type(data).__name__}, expected an object: run fsck")
    return data


def _tensors(data: dict[str, Any]) -> dict[str, TensorRecord]:
    out = {}
    for name, t in data["tensors"].items():
        if t["dtype"] not in ids.DTYPES or "/" in name or name in ("", ".", ".."):
            raise ZooError(f"tensor {name!r} of dtype {t['dtype']!r}")
        out[name] = TensorRecord(shape=tuple(int(n) for n in t["shape"]), dtype=t["dtype"])
    return out


def _check_fit(
    tensors: Mapping[str, TensorRecord],
    refs: Mapping[str, tuple[str, str]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    # The shape of what is tied is that of its target, which is checked when it is read.
    shapes = {**{n: expected.get(n, ()) for n in refs}, **{n: t.shape for n, t in tensors.items()}}
    check_shapes("tensors", shapes, expected)


def _nbytes(data: dict[str, Any], tensors: Mapping[str, TensorRecord]) -> int:
    total = sum(
        ids.DTYPES[t.dtype].itemsize * int(np.prod(t.shape, dtype=np.int64))
        for t in tensors.values()
    )
    if data["nbytes"] != total:
        raise ZooError(f"nbytes is {data['nbytes']!r}, the tensors have {total}")
    return total
