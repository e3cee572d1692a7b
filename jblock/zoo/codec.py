"""Records to and from the zoo's JSON files. Everything read is checked before it is believed."""

import dataclasses
import functools
import json
import math
import os
import re
import stat
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

from jblock.blocks.compressed_spec import BitDeltaSpec, LowRankSpec
from jblock.blocks.delta_spec import KINDS as DELTA_KINDS
from jblock.blocks.delta_spec import DeltaSpec, delta_from_json, delta_to_json
from jblock.blocks.spec import KINDS as COMPONENT_KINDS
from jblock.blocks.spec import ComponentSpec, SpecError, stored_dtype
from jblock.blocks.spec_json import spec_from_json, spec_to_json
from jblock.zoo import ids
from jblock.zoo.records import (
    ComponentRecord,
    DamagedError,
    DeltaRecord,
    NewerError,
    NotFoundError,
    TensorRecord,
    UnreadableError,
    ZooError,
)

_ID = re.compile(r"[0-9a-f]{64}")
RECORD_BYTES = 64 << 20
"""A record of the zoo, or a small file of a model (a tokenizer), has at most so many bytes."""
_MOST_BYTES = 1 << 42  # of the tensors of one component; more is no model
_MOST_VALUES = 1 << 20  # of a JSON file: parsed, each takes up to a hundred bytes
DAMAGE = (
    SpecError,
    ZooError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def is_id(text: str) -> bool:
    """Whether a text is a content id: 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def check_id(id: str) -> str:
    """Returns `id` if it is a content id.

    Raises:
      ZooError: anything but 64 lower-case hexadecimal digits.
    """
    if not is_id(id):
        raise ZooError(f"{id!r} is no id: an id is 64 hexadecimal digits")
    return id


def component_header(record: ComponentRecord) -> dict[str, Any]:
    """What a component's id covers beside its tensors."""
    refs = {name: list(target) for name, target in record.refs.items()}
    return {"spec": spec_to_json(record.spec), "refs": refs}


def delta_header(record: DeltaRecord) -> dict[str, Any]:
    """What a delta's id covers beside its tensors."""
    return {"spec": delta_to_json(record.spec), "component": record.component}


def header(record: ComponentRecord | DeltaRecord) -> dict[str, Any]:
    """What the id of a component or delta covers beside its tensors."""
    return component_header(record) if isinstance(record, ComponentRecord) else delta_header(record)


def shapes_of(spec: DeltaSpec, base: ComponentSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a delta on a component.

    Raises:
      DamagedError: there is no such delta on such a component.
    """
    try:
        return dict(spec.tensors(base))
    except DAMAGE as e:
        raise DamagedError(f"delta of kind {spec.kind!r} does not fit its component: {e}") from e


def component_record(id: str, data: dict[str, Any]) -> ComponentRecord:
    """A component's record from its spec.json.

    Raises:
      NewerError: a kind or a field that this version does not know.
      DamagedError: fields missing, malformed, or not fitting each other.
    """
    _check_known("component", data, COMPONENT_KINDS)
    try:
        spec = spec_from_json(data["spec"])
        check_types(spec)
        tensors = tensor_records(data)
        refs = {str(n): (check_id(c), str(t)) for n, (c, t) in data["refs"].items()}
        if any(component == id for component, _ in refs.values()):
            raise ZooError("it refers to itself")
        _check_fit(tensors, refs, spec.tensors())
        check_dtypes(spec, tensors)
        return ComponentRecord(
            id=id, spec=spec, tensors=tensors, refs=refs, nbytes=_nbytes(data, tensors)
        )
    except DAMAGE as e:
        raise DamagedError(f"component {id}: spec.json is damaged ({e}); run fsck") from e


def delta_record(id: str, data: dict[str, Any]) -> DeltaRecord:
    """A delta's record from its spec.json. Its shapes are checked where its component is known.

    Raises:
      NewerError: a kind or a field that this version does not know.
      DamagedError: fields missing, malformed, or not fitting each other.
    """
    _check_known("delta", data, DELTA_KINDS)
    try:
        spec = delta_from_json(data["spec"])
        check_types(spec)
        tensors = tensor_records(data)
        check_dtypes(spec, tensors)
        return DeltaRecord(
            id=id,
            spec=spec,
            component=check_id(data["component"]),
            tensors=tensors,
            nbytes=_nbytes(data, tensors),
        )
    except DAMAGE as e:
        raise DamagedError(f"delta {id}: spec.json is damaged ({e}); run fsck") from e


def _check_known(what: str, data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    surplus = sorted(
        data.keys() - {"spec", "tensors", "nbytes", "refs" if what == "component" else "component"}
    )
    if surplus:
        raise NewerError(
            f"{what} record has the field {surplus[0]!r}: a newer version of jblock wrote it; use "
            "that version"
        )
    spec = data.get("spec")
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(kind, str):
        return  # told as damage
    if kind not in kinds:
        raise NewerError(
            f"{what} kind {kind!r} is not known; known: {', '.join(kinds)}: a newer version of jblock "
            "wrote it; use that version"
        )
    fields = {f.metadata.get("stored_as", f.name) for f in dataclasses.fields(kinds[kind])}
    unknown = sorted(spec.keys() - fields - {"kind"})
    if unknown:
        raise NewerError(
            f"{what} of kind {kind!r} has the field {unknown[0]!r}: a newer version of jblock wrote it; "
            "use that version"
        )


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_types(value: Any) -> None:
    """Checks the plain fields of a dataclass, and of those inside it, against their annotations.

    Raises:
      SpecError: a field of another type, or a number that is not finite.
    """
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        wanted = _hints(type(value))[field.name]  # type: ignore[arg-type]
        options = typing.get_args(wanted) or (wanted,)
        if dataclasses.is_dataclass(item):
            check_types(item)
        elif isinstance(item, dict):
            for inner in item.values():
                if dataclasses.is_dataclass(inner):
                    check_types(inner)
                elif type(inner) is not int:
                    raise SpecError(f"{field.name} has {inner!r}, expected whole numbers")
        elif type(item) in (int, float, bool, str):
            fits = type(item) in options or (type(item) is int and float in options)
            if not fits or (type(item) is float and not math.isfinite(item)):
                raise SpecError(f"{field.name} is {item!r}, expected {wanted}")
        elif item is None and type(None) not in options:
            raise SpecError(f"{field.name} is missing")
        elif item is not None and not isinstance(item, tuple):
            raise SpecError(f"{field.name} is {str(item)[:80]!r}, expected {wanted}")


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


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON file of the zoo holds.

    Raises:
      DamagedError: something else.
    """
    check_values(data, where)
    try:
        found = json.loads(data, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise DamagedError(f"{where} holds no JSON ({e}): the zoo is damaged; run fsck") from e
    if not isinstance(found, dict):
        raise DamagedError(f"{where} holds {type(found).__name__}, expected an object: run fsck")
    return found


def check_values(data: bytes, where: str) -> None:
    """Checks that JSON does not hold so many values that they would fill memory.

    Raises:
      DamagedError: it does.
    """
    count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > _MOST_VALUES:
        raise DamagedError(f"{where} holds {count} values, at most {_MOST_VALUES} are read")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a local JSON file.

    Raises:
      ZooError: no such file, or something else in it.
    """
    return parse_json(read_file(path), str(path))


def read_file(path: str | Path, limit: int = RECORD_BYTES) -> bytes:
    """The bytes of a small regular file; links are not followed.

    Raises:
      NotFoundError: there is none.
      DamagedError: it is no regular file, or too large to be what it stands for.
      UnreadableError: the disk, the network or its permissions do not let it be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path} is no regular file: remove it")
            if found.st_size > limit:
                raise DamagedError(f"{path} has {found.st_size} bytes, at most {limit} are read")
            parts, left = [], limit
            while left and (part := os.read(fd, asked := min(left, found.st_size + 1))):
                parts.append(part)
                left -= len(part)
                if len(part) < asked:
                    break  # a regular file ends there
            return b"".join(parts)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFoundError(f"{path} is not there: it was removed or never added") from e
    except OSError as e:
        if os.path.islink(path):
            raise DamagedError(
                f"{path} is a link: a zoo holds everything itself; replace it by a copy"
            ) from e
        raise unreadable(path, e) from e


def unreadable(path: str | Path, e: OSError) -> UnreadableError:
    """The error for what is there and cannot be read."""
    return UnreadableError(
        f"{path} cannot be read ({e.strerror}): check its permissions and the disk; nothing says that it is "
        "damaged"
    )


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _no_constant(text: str) -> Never:
    raise ValueError(f"{text} is no number")


def tensor_records(data: Mapping[str, Any]) -> dict[str, TensorRecord]:
    """The tensors of a spec.json, by name; raises one of DAMAGE."""
    out = {}
    for name, t in data["tensors"].items():
        if t["dtype"] not in ids.DTYPES or "/" in name or "\0" in name or name in ("", ".", ".."):
            raise ZooError(f"tensor {name!r} of dtype {t['dtype']!r}")
        if not all(type(n) is int and 0 <= n < 2**40 for n in t["shape"]):
            raise ZooError(f"tensor {name!r} of shape {t['shape']!r}")
        out[name] = TensorRecord(shape=tuple(t["shape"]), dtype=t["dtype"])
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
    total = sum(ids.DTYPES[t.dtype].itemsize * math.prod(t.shape) for t in tensors.values())
    if data["nbytes"] != total or total > _MOST_BYTES:
        raise ZooError(f"nbytes is {data['nbytes']!r}, the tensors have {total}")
    return total
