"""Weights to few bits and back, in numpy: symmetric, absolute maximum of a group.

The numbers are qwix's (https://github.com/google/qwix, `absmax` calibration, "subchannel" tiles): the
scale is the largest magnitude over `2**(bits-1) - 0.5`, so that the outermost code is used as much as
its neighbors, and halves are rounded to even. `tests/blocks/test_quantize.py` holds them to what qwix
itself computed.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jblock.blocks.quant_spec import BOOK, CODES, ORDER, SCALES, ZEROS, QuantSpec

INT4 = np.dtype(ml_dtypes.int4)
# Below it a scale is 1: dividing by it would overflow.
_TINY = np.sqrt(np.finfo(np.float32).tiny)


def quantize(weight: np.ndarray, spec: QuantSpec) -> dict[str, np.ndarray]:
    """Codes and scales of one weight, as they are stored, by the last part of their names.

    Args:
      weight: [out, in], any float dtype.
      spec: how; without zeros and order.
    """
    out, inner = weight.shape
    groups = weight.astype(np.float32).reshape(out, -1, spec.group_of(inner))
    top = 2 ** (spec.bits - 1)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(top - 0.5)
    scales = np.where(scales < _TINY, np.float32(1), scales)
    codes = np.clip(np.round(groups / scales), -top, top - 1).astype(np.int8).reshape(out, inner)
    return {CODES: pack(codes) if spec.bits == 4 else codes, SCALES: scales[..., 0]}


def pack(codes: np.ndarray) -> np.ndarray:
    """int8 [out, in] of -8 to 7 -> uint8 [out, in / 2], two to a byte as QuantSpec says."""
    halves = codes.astype(np.uint8) & 0xF
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack`, as int4 (one to a byte of host memory)."""
    halves = np.stack([packed & 0xF, packed >> 4], axis=-1).astype(np.int8)
    return ((halves ^ 8) - 8).reshape(len(packed), -1).astype(INT4)


def dequantize(
    tensors: Mapping[str, np.ndarray], projection: str, spec: QuantSpec, inputs: int = 0
) -> np.ndarray:
    """The float32 weight [out, in] that the stored tensors of a projection stand for.

    `inputs` is needed for the form "book", whose codes do not say how many columns they make.
    """
    if spec.made_float:
        if spec.form == "e4m3":
            weight = _from_e4m3(tensors, projection, spec)
        else:
            weight = _from_book(tensors, projection, spec).reshape(-1, inputs)
        return weight.astype(spec.rounded or np.float32).astype(np.float32)
    codes = tensors[f"{projection}.{CODES}"]
    codes = (unpack(codes) if spec.bits == 4 else codes).astype(np.float32)
    scales = tensors[f"{projection}.{SCALES}"]
    groups = codes.reshape(*scales.shape, -1)
    if spec.zeros:
        groups = groups - tensors[f"{projection}.{ZEROS}"].astype(np.float32)[..., None]
    weight = (groups * scales[..., None]).reshape(codes.shape)
    if not spec.ordered:
        return weight
    out = np.empty_like(weight)
    out[:, tensors[f"{projection}.{ORDER}"]] = weight
    return out


def _from_e4m3(tensors: Mapping[str, np.ndarray], projection: str, spec: QuantSpec) -> np.ndarray:
    codes = tensors[f"{projection}.{CODES}"]
    scales = tensors[f"{projection}.{SCALES}"]
    out, inner = codes.shape
    wide = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for axis, (size, block) in enumerate(((out, spec.rows), (inner, spec.group))):
        scales = np.repeat(scales, block or size, axis=axis)
    return wide * scales[:out, :inner]


def _from_book(tensors: Mapping[str, np.ndarray], projection: str, spec: QuantSpec) -> np.ndarray:
    """The elements in row-major order."""
    packed = tensors[f"{projection}.{CODES}"]
    codes = np.stack([packed >> 4, packed & 0xF], axis=-1).reshape(-1)
    scales = np.repeat(tensors[f"{projection}.{SCALES}"], spec.group)
    count = min(len(codes), len(scales))
    return tensors[f"{projection}.{BOOK}"][codes[:count]] * scales[:count]
