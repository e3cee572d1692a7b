"""The tensors of one component on disk: one safetensors file.

Its layout follows from the records of the tensors alone: the header, padded to 64 bytes, then the tensors in
the order of their names. So a file whose header is not exactly that is damaged, and a tensor is read from
its place without parsing anything. Any safetensors library reads it.

Zoos of format 1 hold orbax checkpoints (`params/`, zarr 2 without compression, a raw file a tensor), which
took about 19 inodes a component; orbax's OCDBT takes 12 and cannot be read without its library. They are
still read, without orbax.
"""

import contextlib
import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jblock.zoo import codec
from jblock.zoo.ids import DTYPES, raw_bytes, tensor_records
from jblock.zoo.records import DamagedError, TensorRecord, UnreadableError, ZooError

FILE = "params.safetensors"
_OLD = "params"
_ALIGNED = 64  # what XLA can use in place
# A file with so much less on the disk than in its length was made to fill memory, not to hold weights.
_SPARSE_FROM, _SPARSE_SHARE = 16 << 20, 16

_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
}
_ZARR_DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "bfloat16",
    "int8": "|i1",
    "uint8": "|u1",
    "int32": "<i4",
}
Place = tuple[Path, int, int]
"""A file, and where a tensor begins and ends in it."""


def save(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` into the folder of a component, which has none yet."""
    with open(folder / FILE, "xb") as f:
        f.write(_header(tensor_records(tensors)))
        for name in sorted(tensors):
            f.write(raw_bytes(tensors[name]).data)


def load(
    folder: Path, records: Mapping[str, TensorRecord], only: str = ""
) -> dict[str, np.ndarray]:
    """Reads the tensors of a component into host memory of their own.

    Args:
      folder: of the component.
      records: of all its tensors.
      only: the one tensor to read; all when empty.

    Raises:
      DamagedError: a file is missing, is no regular file, or does not hold what its record says.
      UnreadableError: the disk, the network or its permissions do not let it be read.
    """
    places = _places(folder, records)
    return {
        name: _read(places[name], record) for name, record in records.items() if only in ("", name)
    }


def files(folder: Path, records: Mapping[str, TensorRecord]) -> list[Path]:
    """The files that hold the tensors of a component."""
    return list(dict.fromkeys(place[0] for place in _places(folder, records).values()))


def prefetch(folder: Path, records: Mapping[str, TensorRecord]) -> None:
    """Asks the kernel to begin reading what `load` will want; only a hint, of which nothing is told."""
    with contextlib.suppress(OSError, ZooError):
        for path in files(folder, records):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                advise_soon(fd, 0, 0)
            finally:
                os.close(fd)


def advise_soon(fd: int, offset: int, length: int) -> None:
    """Tells the kernel that some bytes of a file will be read soon, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def read_runs(
    folder: Path,
    records: Mapping[str, TensorRecord],
    name: str,
    starts: Sequence[int] | np.ndarray,
    length: int,
) -> np.ndarray:
    """Runs of `length` elements of one tensor, one behind each of `starts`, without reading the rest.

    Args:
      folder: of the component.
      records: of all its tensors.
      name: of the tensor.
      starts: index of the first element of each run, in C order.
      length: elements of a run.

    Returns:
      float32 [len(starts) * length].

    Raises:
      DamagedError: the file is missing, is no regular file, or too short.
      UnreadableError: see `load`.
    """
    path, begin, end = _places(folder, records)[name]
    dtype = DTYPES[records[name].dtype]
    size = length * dtype.itemsize
    with _open(path) as f:
        offsets = [begin + int(start) * dtype.itemsize for start in starts]
        parts = [os.pread(f.fileno(), min(size, end - at), at) for at in offsets]
    if any(len(part) != size for part in parts):
        raise _damaged(path, "too short")
    return np.frombuffer(b"".join(parts), dtype).astype(np.float32)


def nbytes_of(record: TensorRecord) -> int:
    """Bytes of a tensor."""
    size = DTYPES[record.dtype].itemsize
    for n in record.shape:
        size *= n
    return size


def _header(records: Mapping[str, TensorRecord]) -> bytes:
    described: dict[str, Any] = {}
    at = 0
    for name, record in sorted(records.items()):
        end = at + nbytes_of(record)
        described[name] = {
            "dtype": _NAMES[record.dtype],
            "shape": list(record.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text


def _places(folder: Path, records: Mapping[str, TensorRecord]) -> dict[str, Place]:
    path = folder / FILE
    if not records:
        return {}
    if not os.path.lexists(path) and os.path.lexists(folder / _OLD):
        return _old_places(folder / _OLD, records)
    header = _header(records)
    places, at = {}, len(header)
    for name, record in sorted(records.items()):
        places[name] = (path, at, at + nbytes_of(record))
        at += nbytes_of(record)
    with _open(path) as f:
        _check_size(path, f, at)
        if f.read(len(header)) != header:
            raise _damaged(path, "its header is not that of the tensors in spec.json")
    return places


def _old_places(folder: Path, records: Mapping[str, TensorRecord]) -> dict[str, Place]:
    places = {}
    for name, record in records.items():
        description = {
            "zarr_format": 2,
            "shape": list(record.shape),
            "chunks": list(record.shape),  # the whole tensor is one file
            "dtype": _ZARR_DTYPES[record.dtype],
            "order": "C",
            "compressor": None,
            "filters": None,
        }
        for at in (folder, folder / name):
            if at.is_symlink():
                raise _damaged(at, "a link")
        with _open(folder / name / ".zarray") as f:
            try:
                found = json.loads(f.read(4096))
            except (ValueError, RecursionError) as e:
                raise _damaged(folder / name / ".zarray", str(e)) from e
        if not isinstance(found, dict) or {k: found.get(k) for k in description} != description:
            raise _damaged(folder / name / ".zarray", f"{found}, expected {description}")
        path = folder / name / ".".join("0" for _ in record.shape)
        with _open(path) as f:
            _check_size(path, f, nbytes_of(record))
        places[name] = (path, 0, nbytes_of(record))
    return places


def _read(place: Place, record: TensorRecord) -> np.ndarray:
    path, begin, end = place
    dtype = DTYPES[record.dtype]
    with _open(path) as f:
        f.seek(begin)
        try:
            value = np.fromfile(f, dtype=dtype, count=(end - begin) // dtype.itemsize)
        except OSError as e:
            raise UnreadableError(f"{path} cannot be read: {e.strerror}") from e
    if value.nbytes != end - begin:
        raise _damaged(path, f"{value.nbytes} bytes, expected {end - begin}")
    return value.reshape(record.shape)


def _check_size(path: Path, f: BinaryIO, expected: int) -> None:
    found = os.fstat(f.fileno())
    if found.st_size != expected:
        raise _damaged(path, f"{found.st_size} bytes, expected {expected}")
    if expected > _SPARSE_FROM and found.st_blocks * 512 * _SPARSE_SHARE < expected:
        raise _damaged(
            path, f"{expected} bytes long with {found.st_blocks * 512} of them on the disk"
        )


@contextlib.contextmanager
def _open(path: Path):
    """A regular file of the zoo, opened for reading; links are not followed."""
    try:
        with open(path, "rb", opener=_no_links) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise _damaged(path, "no regular file")
            yield f
    except ZooError:
        raise
    except FileNotFoundError as e:
        raise _damaged(path, "is missing") from e
    except OSError as e:
        if path.is_symlink() or path.is_dir() or isinstance(e, NotADirectoryError):
            raise _damaged(path, str(e.strerror)) from e
        raise codec.unreadable(path, e) from e


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _damaged(path: Path, found: str) -> DamagedError:
    return DamagedError(
        f"{path}: {found}: the zoo is damaged; run 'fsck --repair' and convert the model again"
    )
