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
_MESSAGES = (api.Request, api.SamplingParams, api.Output, api.ModelInfo, api.EngineStats)
# Of every field; what equals nothing where a field has none.
_DEFAULTS: Mapping[type, Mapping[str, Any]] = {
    cls: {field.name: field.default for field in dataclasses.fields(cls)} for cls in _MESSAGES
}
# Errors that are raised again on the other side, the special before the general.
ERRORS: Mapping[str, type[Exception]] = {"unknown": api.UnknownChain, "invalid": ValueError}


def pack(kind: str, body: Any = None) -> bytes:
    """One frame. `body` is made of None, bools, ints, floats, strings, lists and string maps."""
    return msgpack.packb([kind, body], use_bin_type=True)


def unpack(frame: bytes) -> tuple[str, Any]:
    """The kind and body of a frame; lists come back as tuples.

    Raises:
      ValueError: the bytes are no frame.
    """
    try:
        kind, body = msgpack.unpackb(frame, raw=False, use_list=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"frame of {len(frame)} bytes is not [kind, body] in msgpack ({error}); "
            "both ends must run the same version of jblock"
        ) from error
    return kind, body


def to_plain(message: Any) -> dict[str, Any]:
    """The map of a dataclass of `jblock.engine.api`: its fields that differ from their defaults."""
    defaults = _DEFAULTS[type(message)]
    plain = {name: value for name, value in vars(message).items() if value != defaults[name]}
    for name in _NESTED.keys() & plain.keys():
        plain[name] = to_plain(plain[name])
    return plain


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass that `to_plain` took apart."""
    nested: dict[str, Any] = {
        name: from_plain(_NESTED[name], plain[name]) for name in _NESTED.keys() & plain.keys()
    }
    return cls(**{**plain, **nested})
