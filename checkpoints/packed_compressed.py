"""Checkpoints of compressed-tensors (llm-compressor): weights of 4 or 8 bits, or of FP8.

  int-quantized    weight int8 [out, in]
  pack-quantized   weight_packed int32 [out, in / n], n codes to a word along inputs, the first in its
                   lowest bits, each with 2^(bits-1) added; weight_shape [2]
  float-quantized  weight float8_e4m3fn [out, in]
  weight_scale     [out, groups], [out, 1], [1], or a number for each block of a float weight
  weight_zero_point  of asymmetric ones: as the scales, int8, or packed along outputs as weights are
  weight_g_idx     int32 [in]: the group of each input

  weight[o, i] = weight_scale[o, g] * (code[o, i] - zero[o, g])

Scales of activations and of KV caches are not used: only weights are of few bits here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packed_fp8 import E4M3, FLOAT_SCALES, WEIGHTS_ONLY, e4m3_module, is_e4m3
from checkpoints.packing import FIELD, PackedModule, codes_of, order_of, tensor
from checkpoints.source import Source
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS, QuantSpec

_FORMATS = (
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized"),
    *("mixed-precision", "dense"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """Weights of compressed-tensors. `block` is what shares a scale in float weights scaled by blocks."""

    block: tuple[int, int] | None = None
    suffixes: tuple[str, ...] = (
        *(".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"),
        *(".weight_g_idx", ".input_scale", ".input_zero_point"),
    )
    notes: tuple[str, ...] = ()

    def packs(self, source: Source, module: str) -> bool:
        """See Packing."""
        info = source.tensors.get(f"{module}.weight")
        whole = info is not None and info.dtype.name in ("int8", E4M3)
        return whole or f"{module}.weight_packed" in source.tensors

    def read(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        """See Packing."""
        scales = tensor(source, f"{module}.weight_scale", None, *FLOAT_SCALES).astype(np.float32)
        if is_e4m3(source, module):
            return e4m3_module(source, module, (out, inner), scales, self._block(scales, inner))
        if f"{module}.weight_packed" in source.tensors:
            codes, bits = _unpacked(source, module, out, inner)
        else:
            codes, bits = tensor(source, f"{module}.weight", (out, inner), "int8"), 8
        if scales.size == 1:
            scales = np.full((out, 1), scales.reshape(-1)[0], np.float32)
        groups = scales.shape[-1]
        if scales.shape != (out, groups) or inner % groups:
            raise CheckpointError(
                f"{source.path}: the scales of {module!r} are {list(scales.shape)}, a weight of {out} x "
                f"{inner} needs [{out}, groups] of equal groups: what they belong to is not known"
            )
        tensors = {CODES: codes, SCALES: scales}
        zeros = _zeros(source, module, scales.shape, bits)
        order = _order(source, module, inner, inner // groups)
        if zeros is not None and zeros.any():
            tensors[ZEROS] = zeros
        if order is not None:
            tensors |= {ORDER: order, CODES: np.ascontiguousarray(codes[:, order])}
        quant = QuantSpec(
            bits=bits, group=inner // groups, zeros=ZEROS in tensors, ordered=order is not None
        )
        return PackedModule(quant=quant, tensors=tensors)

    def _block(self, scales: np.ndarray, inner: int) -> tuple[int, int]:
        if self.block is not None:
            return self.block
        if scales.size == 1:
            return 0, 0
        groups = scales.shape[-1] if scales.ndim == 2 else 1
        return 1, 0 if groups == 1 else -(-inner // groups)


def compressed_tensors_of(given: Mapping[str, Any]) -> CompressedTensors:
    """Reads the section of config.json.

    Raises:
      CheckpointError: a format or transform that is not known.
    """
    groups = given.get("config_groups") or {}
    sections = [s for s in groups.values() if isinstance(s, Mapping)]
    formats = [given.get("format"), *(s.get("format") for s in sections)]
    for name in formats:
        if name is not None and name not in _FORMATS:
            raise CheckpointError(
                f"config.json: {FIELD} has format {name!r}, whose layout is not known; known: "
                f"{', '.join(_FORMATS)}: take the float checkpoint and use 'jblock convert quantize'"
            )
    sparsity = given.get("sparsity_config") or {}
    transforms = given.get("transform_config") or {}
    if sparsity.get("format", "dense") != "dense" or transforms.get("config_groups"):
        field = "transform_config" if transforms.get("config_groups") else "sparsity_config"
        raise CheckpointError(
            f"config.json: {FIELD} has a {field}, which is not known: take the float checkpoint and use "
            "'jblock convert quantize'"
        )
    weights = [s.get("weights") or {} for s in sections]
    blocks = {tuple(w["block_structure"]) for w in weights if w.get("block_structure")}
    if len(blocks) > 1 or any(len(b) != 2 for b in blocks):
        raise CheckpointError(
            f"config.json: {FIELD} has block_structure {sorted(blocks)}; one of two numbers is known"
        )
    rounded = any(s.get("input_activations") for s in sections) or given.get("kv_cache_scheme")
    return CompressedTensors(
        block=next(iter(blocks), None), notes=(WEIGHTS_ONLY,) if rounded else ()
    )


def _unpacked(source: Source, module: str, out: int, inner: int) -> tuple[np.ndarray, int]:
    """int8 [out, in] codes and their bits, which the number of words says."""
    info = source.tensors[f"{module}.weight_packed"]
    columns = info.shape[-1] if info.shape else 0
    bits = next((b for b in (4, 8) if columns == -(-inner * b // 32)), 0)
    if not bits or inner % (32 // bits):
        raise CheckpointError(
            f"{source.path}: tensor {info.name!r} is {list(info.shape)}, which {out} x {inner} codes of 4 "
            "or 8 bits do not make: other packings are not known"
        )
    words = tensor(source, info.name, (out, columns), "int32")
    codes = codes_of(words, bits).reshape(out, inner)
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8), bits


def _zeros(source: Source, module: str, shape: tuple[int, ...], bits: int) -> np.ndarray | None:
    """int8, of the scales' shape; None where there are none."""
    name = f"{module}.weight_zero_point"
    if name not in source.tensors:
        return None
    found = tensor(source, name, None, "int8", "int32")
    if found.dtype == np.int8:
        if found.size != 1 and found.shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} is {list(found.shape)}, the scales are {list(shape)}"
            )
        return np.broadcast_to(found.reshape(-1)[0] if found.size == 1 else found, shape).copy()
    out, groups = shape
    words = tensor(source, name, (-(-out * bits // 32), groups), "int32")
    codes = codes_of(words, bits).transpose(0, 2, 1).reshape(-1, groups)[:out]
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _order(source: Source, module: str, inner: int, group: int) -> np.ndarray | None:
    name = f"{module}.weight_g_idx"
    if name not in source.tensors:
        return None
    g_idx = tensor(source, name, (inner,), "int32", "int64").astype(np.int32)
    return None if (g_idx < 0).any() else order_of(source, name, g_idx, group)
