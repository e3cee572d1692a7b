"""Values in and out of the protocol's tensors."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import invalid
from serving.open_inference import messages as pb

# The letter of struct and the field of contents, by type.
_KINDS: Mapping[str, tuple[str, str]] = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
}


def inputs_of(request: pb.ModelInferRequest) -> dict[str, list[Any]]:
    """The values of a request's inputs, by name; BYTES are text.

    Raises:
      RequestError: one is not what its type and shape say.
    """
    raw = list(request.raw_input_contents)
    found: dict[str, list[Any]] = {}
    for at, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in found:
            raise invalid(f"inputs.{name[:40]}: is there twice; send it once")
        if raw:
            if at >= len(raw):
                raise invalid("raw_input_contents: are fewer than inputs; send one for each")
            values = _raw(name, tensor.datatype, raw[at])
        else:
            values = _contents(name, tensor)
        count = 1
        for size in tensor.shape:
            count *= size
        if count != len(values):
            raise invalid(f"inputs.{name[:40]}: has {len(values)} values for a shape of {count}")
        found[name] = values
    return found


def parameter(value: pb.InferParameter) -> Any:
    """The value of a parameter; a whole number may have come as a float."""
    kind = value.WhichOneof("parameter_choice")
    found = getattr(value, kind) if kind else None
    return int(found) if isinstance(found, float) and found.is_integer() else found


def add_output(
    response: pb.ModelInferResponse, name: str, kind: str, values: Sequence[Any]
) -> None:
    """Adds a tensor of one dimension."""
    response.outputs.add(name=name, datatype=kind, shape=[len(values)])
    if kind == "BYTES":
        texts = [str(value).encode() for value in values]
        data = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    else:
        data = struct.pack(f"<{len(values)}{_KINDS[kind][0]}", *values)
    response.raw_output_contents.append(data)


def _raw(name: str, kind: str, data: bytes) -> list[Any]:
    if kind == "BYTES":
        found = []
        at = 0
        while at < len(data):
            end = at + 4
            size = int.from_bytes(data[at:end], "little")
            if end + size > len(data):
                raise invalid(f"inputs.{name[:40]}: its bytes end before they should")
            found.append(_text(name, data[end : end + size]))
            at = end + size
        return found
    letter, _ = _kind(name, kind)
    size = struct.calcsize(f"<{letter}")
    if len(data) % size:
        raise invalid(f"inputs.{name[:40]}: has {len(data)} bytes, which are no {kind}")
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


def _contents(name: str, tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any]:
    if tensor.datatype == "BYTES":
        return [_text(name, data) for data in tensor.contents.bytes_contents]
    return list(getattr(tensor.contents, _kind(name, tensor.datatype)[1]))


def _kind(name: str, kind: str) -> tuple[str, str]:
    if kind not in _KINDS:
        raise invalid(f"inputs.{name[:40]}: {kind[:20]!r} is no type that is taken here")
    return _KINDS[kind]


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"inputs.{name[:40]}: is no text in UTF-8") from error
