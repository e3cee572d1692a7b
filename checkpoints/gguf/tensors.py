"""The numbers of a GGUF tensor, as the `gguf` package dequantizes them."""

import math
from pathlib import Path

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.gguf.file import GgufTensor
from jblock.zoo.ids import DTYPES

# Those that are as they are, and the dtype they have here.
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_SLICE = 1 << 24  # elements that are dequantized at once


def dtype(tensor: GgufTensor) -> np.dtype:
    """What `read` gives: the dtype of F32, F16 and BF16, float32 for quantized tensors.

    Raises:
      CheckpointError: a type that is not served.
    """
    if tensor.type in _QUANTIZED:
        return DTYPES["float32"]
    if tensor.type not in _PLAIN:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} is in {tensor.type}; served: "
            f"{', '.join((*_PLAIN, *_QUANTIZED))}: take the same model in one of them"
        )
    return DTYPES[_PLAIN[tensor.type]]


def read(tensor: GgufTensor) -> np.ndarray:
    """The tensor in memory of its own: as it is, or dequantized to float32.

    Raises:
      CheckpointError: the file became shorter, or a type that is not served.
    """
    out = np.empty(tensor.shape, dtype(tensor))
    if tensor.type in _PLAIN:
        _fill(tensor.path, tensor.name, tensor.start, out.reshape(-1).view(np.uint8))
        return out
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    columns = tensor.shape[-1]
    rows = out.reshape(-1, columns)
    row_bytes = tensor.nbytes // max(len(rows), 1)
    step = max(1, _SLICE // columns)
    kind = GGMLQuantizationType[tensor.type]
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        packed = np.empty((len(part), row_bytes), np.uint8)
        _fill(tensor.path, tensor.name, tensor.start + first * row_bytes, packed.reshape(-1))
        part[:] = dequantize(packed, kind)
    return out


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's q or k (weight [heads * head_dim, in], or bias) as transformers has them.

    llama.cpp rotates neighboring pairs, so its converter puts the two halves of each head side by side; this
    puts them back (`LlamaModel.permute` of its convert_hf_to_gguf.py, undone).
    """
    half = math.prod(weight.shape[:1]) // heads // 2
    pairs = weight.reshape(heads, half, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _fill(path: Path, name: str, start: int, out: np.ndarray) -> None:
    """Reads bytes from `start` on into `out`, one dimension of uint8."""
    try:
        with open(path, "rb") as f:
            f.seek(start)
            count = f.readinto(out.data)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    if count != out.nbytes:
        raise CheckpointError(f"{path} ended within {name!r}: copy it again")
