"""What an agent on another host says to the server that it works for. The server says first what to start
(`wire.Start`), then what the engine's process is to hear."""

import msgspec

SERVICE = "jblock.agent.1"
"""The name of the service; the number grows when what is said changes."""


class Here(msgspec.Struct, frozen=True, array_like=True, tag="here"):
    """The engine's process is there; said first, and every second. `wants_to_run`: see `Child`."""

    pid: int
    wants_to_run: bool


class Said(msgspec.Struct, frozen=True, array_like=True, tag="said"):
    """A frame of the engine's process."""

    frame: bytes


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """There is none any more, or none yet: how it ended, and what it said last."""

    how: str
    words: str = ""


OfAgent = Here | Said | Ended

_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(OfAgent)


def pack(message: OfAgent) -> bytes:
    """A message as bytes."""
    return _ENCODER.encode(message)


def unpack(data: bytes) -> OfAgent:
    """The message.

    Raises:
      ConnectionError: it is none; nothing that comes behind it can be used.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConnectionError(
            f"{len(data)} bytes are no message of an agent ({error}); run the same version of jblock "
            "everywhere"
        ) from error
