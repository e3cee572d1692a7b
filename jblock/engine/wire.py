"""How the engine's messages travel between processes: msgpack of plain maps, never pickle.

A frame is `[kind, body]`. A dataclass travels as a map of the fields that differ from their
defaults, so that a step's outputs stay small and a field added later does not break a peer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import msgpack

from jblock.engine import api

T = TypeVar("T")

# Fields that hold a dataclass of their own.
_NESTED: Mapping[str, type] = {"sampling": api.SamplingParams}
# Errors that are raised again on the other side, the special before the general.
ERRORS: Mapping[str, type[Exception]] = {"unknown": api.UnknownChain, "invalid": ValueError}


def pack(kind: str, body: Any = None) -> bytes:
    """One frame. `body` is made of None, bools, ints, floats, strings, lists and string maps."""
    return msgpack.packb([kind, body], use_bin_type=True)


def unpack(frame: bytes) -> tuple[str, Any]:
    """The kind and body of a frame.

    Raises:
      ValueError: the bytes are no frame.
    """
    try:
        kind, body = msgpack.unpackb(frame, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"frame of {len(frame)} bytes is not [kind, body] in msgpack ({error}); "
            "both ends must run the same version of jblock"
        ) from error
    return kind, body


def to_plain(message: Any) -> dict[str, Any]:
    """The map of a dataclass of `jblock.engine.api`: its fields that differ from their defaults."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if value == field.default:
            continue
        plain[field.name] = to_plain(value) if dataclasses.is_dataclass(value) else value
    return plain


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass that `to_plain` took apart; lists come back as tuples."""
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if name in _NESTED:
            value = from_plain(_NESTED[name], value)
        elif isinstance(value, list):
            value = _tuples(value)
        values[name] = value
    return cls(**values)


def _tuples(value: list[Any]) -> tuple[Any, ...]:
    """A list as a tuple, lists in it too; lists are of one kind throughout."""
    if value and isinstance(value[0], list):
        return tuple(_tuples(v) for v in value)
    return tuple(value)
