"""Content ids: the same content has the same id, whoever computes it, whatever order it comes in."""

import hashlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jblock.blocks.spec_json import canonical_json
from jblock.zoo.records import TensorRecord, ZooError

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
}
FLOATS = ("float32", "float16", "bfloat16")


def tensor_records(tensors: Mapping[str, np.ndarray]) -> dict[str, TensorRecord]:
    """Shape and dtype of each tensor, by name, in the order of the names.

    Raises:
      ZooError: a dtype the zoo does not store.
    """
    records = {}
    for name, value in sorted(tensors.items()):
        # By name first: numpy takes None for float64 in a comparison.
        if value.dtype.name not in DTYPES or value.dtype != DTYPES[value.dtype.name]:
            raise ZooError(
                f"tensor {name!r} is {value.dtype}; the zoo stores {', '.join(DTYPES)}: cast it"
            )
        records[name] = TensorRecord(shape=tuple(value.shape), dtype=value.dtype.name)
    return records


def records_json(records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    """Plain JSON of tensor records."""
    return {n: {"shape": list(r.shape), "dtype": r.dtype} for n, r in sorted(records.items())}


def raw_bytes(value: np.ndarray) -> np.ndarray:
    """The bytes of a tensor in C order, as uint8 [nbytes]; a view where it lies so already."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def content_id(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over `header`, names, shapes and dtypes, then the raw bytes by sorted name.

    `header` is plain JSON: the spec with the references (component) or the component (delta).
    """
    described = {**header, "tensors": records_json(tensor_records(tensors))}
    digest = hashlib.sha256(canonical_json(described).encode() + b"\0")
    for name in sorted(tensors):
        digest.update(raw_bytes(tensors[name]).data)
    return digest.hexdigest()


def files_id(files: Mapping[str, bytes]) -> str:
    """sha256 (hex) over names, lengths and bytes of a folder of small files."""
    lengths = {name: len(data) for name, data in files.items()}
    digest = hashlib.sha256(canonical_json(lengths).encode() + b"\0")
    for name in sorted(files):
        digest.update(files[name])
    return digest.hexdigest()
