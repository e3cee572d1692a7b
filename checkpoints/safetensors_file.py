"""Reading one safetensors file, tensor by tensor, without trusting a number in it.

The format is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes
(https://huggingface.co/docs/safetensors). The header is parsed here, rather than by the library,
because an export must write the very same header again, and because errors should name the tensor.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from jblock.zoo.ids import FLOATS, raw_bytes

_MAX_HEADER = 100_000_000  # as in the safetensors library
_CHUNK = 1 << 24
# Every dtype whose elements are whole bytes: what a model does not need may have any of them.
_DTYPES = {
    code: np.dtype(kind)
    for code, kind in {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "BOOL": np.bool_,
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: `dtype`, `shape`, and its bytes in `path` from `start` to `end`."""

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start

    def chunks(self) -> Iterator[bytes]:
        """The raw bytes in pieces of at most 16 MiB."""
        left = self.nbytes
        while left:
            try:
                with open(self.path, "rb") as f:
                    f.seek(self.end - left)
                    piece = f.read(min(left, _CHUNK))
            except OSError as e:
                raise CheckpointError(f"{self.path} cannot be read: {e.strerror}") from e
            if not piece:
                raise CheckpointError(f"{self.path} ended within {self.name!r}: copy it again")
            left -= len(piece)
            yield piece

    def holds(self, value: np.ndarray) -> bool:
        """Whether the bytes are those of `value`, without holding them in memory."""
        raw, at = raw_bytes(value).data, 0
        for piece in self.chunks():
            if raw[at : at + len(piece)] != piece:
                return False
            at += len(piece)
        return at == raw.nbytes

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own.

        Raises:
          CheckpointError: the file became shorter, or the tensor holds NaN or Inf.
        """
        value = self.read_unchecked()
        check_finite(self.name, value)
        return value

    def read_unchecked(self) -> np.ndarray:
        """The tensor, in memory of its own, whatever its numbers are.

        Raises:
          CheckpointError: the file became shorter.
        """
        count = math.prod(self.shape)
        try:
            value = np.fromfile(self.path, dtype=self.dtype, count=count, offset=self.start)
        except OSError as e:
            raise CheckpointError(f"{self.path} cannot be read: {e.strerror}") from e
        if value.nbytes != self.nbytes:
            raise CheckpointError(f"{self.path} ended within {self.name!r}: copy it again")
        return value.reshape(self.shape)


def read_header(path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a safetensors file, as it is and parsed.

    Raises:
      CheckpointError: truncated, or what `parse_header` refuses.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is no complete safetensors file: download it again")
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    return raw, parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int | None = None) -> dict[str, TensorInfo]:
    """Where the tensors of a file of `size` bytes with the header `raw` lie.

    Args:
      path: the file, which need not be there yet.
      raw: the JSON of its header.
      size: bytes of the file; None: as many as the header describes.

    Raises:
      CheckpointError: malformed; tensors that overlap, leave holes, reach past the end, have a size
        that does not fit their shape, or a dtype that is not served.
    """
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: header is malformed ({e}): download it again") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is malformed (no object): download it again")
    header.pop("__metadata__", None)
    at = 8 + len(raw)
    tensors = {n: _tensor(path, n, e, at, size) for n, e in header.items()}
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if info.start != at:
            raise CheckpointError(
                f"{path}: tensor {info.name!r} starts at byte {info.start}, expected {at}: tensors "
                "must follow each other; save the checkpoint again"
            )
        at = info.end
    if size is not None and at != size:
        raise CheckpointError(f"{path} has {size} bytes, its header describes {at}: copy it again")
    return tensors


def header_of(tensors: Iterable[TensorInfo]) -> bytes:
    """The header of a file that has these tensors one behind the other, as transformers writes it."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    return json.dumps(header).encode()


def pack_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file with these tensors, as bytes."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": codes[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    encoded = json.dumps(header).encode()
    data = (raw_bytes(value).tobytes() for value in tensors.values())
    return b"".join((struct.pack("<Q", len(encoded)), encoded, *data))


def unpack_tensors(file: bytes) -> dict[str, np.ndarray]:
    """What `pack_tensors` packed.

    Raises:
      CheckpointError: the bytes are damaged.
    """
    (length,) = struct.unpack("<Q", file[:8])
    found = parse_header(Path("tensors"), file[8 : 8 + length], len(file))
    return {
        name: np.frombuffer(file[t.start : t.end], t.dtype).reshape(t.shape)
        for name, t in found.items()
    }


def _tensor(path: Path, name: str, entry: Any, base: int, size: int | None) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        ints = (*shape, start, end)
        if any(type(n) is not int or n < 0 for n in ints) or len(shape) > 8:
            raise ValueError("negative or fractional number")
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path}: entry of tensor {name!r} is malformed: {e}") from e
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, which cannot be read; known: "
            f"{', '.join(_DTYPES)}: convert the unquantized checkpoint"
        )
    if size is not None and base + end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {base + end}, the file has {size}: "
            "download it again"
        )
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} has {end - start} "
            "bytes: save the checkpoint again"
        )
    return TensorInfo(
        name=name,
        path=path,
        dtype=_DTYPES[dtype],
        shape=shape,
        start=base + start,
        end=base + end,
    )


def check_finite(name: str, value: np.ndarray) -> None:
    """Raises CheckpointError where a floating-point tensor holds NaN or Inf."""
    if value.dtype.name not in FLOATS:
        return
    # By the bits of the exponent: numpy has no fast isfinite for bfloat16.
    word, mask = {
        "float32": (np.uint32, 0x7F800000),
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
    }[value.dtype.name]
    bits = value.reshape(-1).view(word)
    for i in range(0, bits.size, 1 << 20):
        bad = (bits[i : i + (1 << 20)] & word(mask)) == word(mask)
        if bad.any():
            raise CheckpointError(
                f"tensor {name!r} holds NaN or Inf (element {i + int(bad.argmax())}): a model with "
                "such weights cannot be served; take an intact checkpoint"
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out
