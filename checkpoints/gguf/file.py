"""Reads a GGUF file: its metadata as plain Python, and its tensors where they lie.

The layout is that of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3,
little-endian. The header is parsed here because the reader of the `gguf` package makes an object for every
token of a vocabulary: it takes 74 s for the header of Llama 3, this takes less than one, and checks every
length against the size of the file. What the numbers of a tensor mean is the package's business.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from checkpoints.errors import CheckpointError

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_MOST_VALUES = 1 << 24
# The number of a type of a value -> its numpy dtype; two more have a length of their own.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
      name: its name in the file ("blk.0.attn_q.weight").
      type: name of its type ("Q4_K").
      shape: as numpy has it, the longest stride first: [out, in] of a projection.
      path, start, nbytes: its bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """One parsed file: metadata by key, and tensors by name in the order of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, or at least is called one."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return True
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a file.

    Raises:
      CheckpointError: no GGUF file, a version that is not known, truncated, or malformed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give a GGUF file")
    try:
        with open(path, "rb") as f:
            return _parse(_Cursor(f, os.path.getsize(path)), path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    except _MoreError as e:
        raise CheckpointError(f"{path} is truncated: {e}: download it again") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is malformed: {e}: download it again") from e


class _MoreError(Exception):
    """A length leads past the end."""


class _Cursor:
    """Reads values one after the other from the beginning of a file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _MoreError(f"{count} bytes expected at byte {self.at}")
        self.at += count
        return self.file.read(count)

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.unpack("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"a value has the type {kind}, which is not known")
        return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()

    def _array(self) -> list[Any]:
        kind, count = self.unpack("<I"), self.unpack("<Q")
        if count > _MOST_VALUES:
            raise ValueError(f"an array has {count} values, more than any vocabulary")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        read: Callable[[], Any] = self.string if kind == _STRING else lambda: self.value(kind)
        return [read() for _ in range(count)]


def _parse(cursor: _Cursor, path: Path) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
    version = cursor.unpack("<I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path} is big-endian, which is not read: take a little-endian file")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF of version {version}; read: 2 and 3: convert it with a current llama.cpp"
        )
    tensor_count, field_count = cursor.unpack("<Q"), cursor.unpack("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key, kind = cursor.string(), cursor.unpack("<I")
        if key in metadata:
            raise ValueError(f"{key!r} occurs twice")
        metadata[key] = cursor.value(kind)
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        tensor = _tensor(path, name, shape, kind, base + offset)
        if name in tensors:
            raise ValueError(f"tensor {name!r} occurs twice")
        if tensor.start + tensor.nbytes > cursor.size:
            raise _MoreError(
                f"tensor {name!r} ends at byte {tensor.start + tensor.nbytes}, the file has {cursor.size}"
            )
        tensors[name] = tensor
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.string(), cursor.unpack("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.unpack("<Q") for _ in range(dimensions)]))
    return name, shape, cursor.unpack("<I"), cursor.unpack("<Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type_ = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name!r} has the type {kind}, which is not known") from None
    count = 1
    for n in shape:
        count *= n
    if not shape or shape[-1] % block:
        raise ValueError(
            f"tensor {name!r} of shape {list(shape)} cannot be in {type_.name}, whose blocks hold {block}"
        )
    return GgufTensor(
        name=name,
        type=type_.name,
        shape=shape,
        path=path,
        start=start,
        nbytes=count // block * size,
    )
