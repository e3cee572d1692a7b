"""How messages travel between the server's process and the engine's: msgpack frames, never pickle.

A frame is an array that begins with its kind. The dataclasses of `jblock.engine.api` are its bodies as they
are: msgspec encodes and checks them. A step with the tokens of 24 requests takes 24 us to encode and 66 us to
decode.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from jblock.engine import api

# Errors that are raised again on the other side, the special before the general.
ERRORS: Mapping[str, type[Exception]] = {"unknown": api.UnknownChain, "invalid": ValueError}


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag=str.lower):
    """Base of all frames; the tag is the class's name in lower case."""


# To the child.


class Start(_Frame, frozen=True):
    """The first frame: which engine to build. `heartbeat` seconds are the longest silence allowed; `cores`
    are the processors to run on, none all, and `environment` are variables to set."""

    factory: str
    kwargs: dict[str, Any]
    heartbeat: float
    cores: tuple[int, ...] = ()
    environment: dict[str, str] = {}


class Submit(_Frame, frozen=True):
    """A request to run."""

    request: api.Request


class Cancel(_Frame, frozen=True):
    """A request to end."""

    request_id: str


class Serve(_Frame, frozen=True):
    """Chains to serve; `Served` with the same number answers."""

    number: int
    models: tuple[str, ...]
    base: tuple[str, ...] | None = None


class Close(_Frame, frozen=True):
    """The child is to end."""


# To the parent.


class Models(_Frame, frozen=True):
    """The engine is warm and serves these."""

    models: tuple[api.ModelInfo, ...]


class Served(_Frame, frozen=True):
    """Answers `Serve`: what is served now, or the kind of error (of ERRORS, or "other") and its words."""

    number: int
    models: tuple[api.ModelInfo, ...] = ()
    refused: str = ""
    message: str = ""


class Step(_Frame, frozen=True):
    """What one step brought; counters and gauges where they changed, as `pack_stats` makes them: they come
    more often than anybody looks at them."""

    outputs: tuple[api.Output, ...]
    stats: bytes = b""


class Running(_Frame, frozen=True):
    """How the set of requests that the next step computes differs from the step's before. It is sent before
    that step begins, so that it is known which requests ran when the process died."""

    begun: tuple[str, ...]
    ended: tuple[str, ...]


class Up(_Frame, frozen=True):
    """Whether the engine computes now, of one that is shared and replaces its own processes."""

    up: bool


class Beat(_Frame, frozen=True):
    """The child is alive and has nothing else to say."""


class Invalid(_Frame, frozen=True):
    """The factory refused its arguments."""

    message: str


class Died(_Frame, frozen=True):
    """The engine ended without being asked to."""

    message: str


ToChild = Start | Submit | Cancel | Serve | Close
ToParent = Models | Served | Step | Running | Up | Beat | Invalid | Died

_encoder = msgspec.msgpack.Encoder()
_decoders: Mapping[Any, msgspec.msgpack.Decoder] = {
    kinds: msgspec.msgpack.Decoder(kinds) for kinds in (ToChild, ToParent, api.EngineStats)
}


def pack(frame: ToChild | ToParent) -> bytes:
    """One frame as bytes.

    Raises:
      TypeError: it holds an object that is no plain data.
    """
    return _encoder.encode(frame)


def pack_stats(stats: api.EngineStats) -> bytes:
    """Counters and gauges for a `Step`."""
    return _encoder.encode(stats)


def unpack_stats(data: bytes) -> api.EngineStats:
    """What `pack_stats` packed.

    Raises:
      ValueError: the bytes are no such record.
    """
    return _unpack(data, api.EngineStats)


def for_child(data: bytes) -> ToChild:
    """The frame that a parent packed.

    Raises:
      ValueError: the bytes are no such frame.
    """
    return _unpack(data, ToChild)


def for_parent(data: bytes) -> ToParent:
    """The frame that a child packed.

    Raises:
      ValueError: the bytes are no such frame.
    """
    return _unpack(data, ToParent)


def _unpack(data: bytes, kinds: Any) -> Any:
    try:
        return _decoders[kinds].decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(
            f"frame of {len(data)} bytes is no message of the engine's boundary ({error}); both ends must "
            "run the same version of jblock"
        ) from error
