"""Checkpoints that bitsandbytes quantized: NF4 and FP4, and LLM.int8.

4 bits, over the weight's elements in row-major order, `blocksize` of them with a scale:
  weight                 uint8 [elements / 2, 1], the earlier element in the high half of a byte
  weight.quant_map       float32 [16]: what the codes stand for
  weight.absmax          float32 [blocks]; or with double quantization uint8 [blocks], codes of
                         weight.nested_quant_map float32 [256] with scales weight.nested_absmax float32
                         [blocks / nested_blocksize], to which nested_offset is added
  weight.quant_state.bitsandbytes__nf4   a JSON object as bytes: blocksize, shape, dtype, nested_*
8 bits:
  weight int8 [out, in], SCB float32 [out]: weight[o, i] * SCB[o] / 127

The library rounds what it unpacks to the dtype that its state names, and so is it done here.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packed_fp8 import WEIGHTS_ONLY
from checkpoints.packing import FIELD, PackedModule, tensor
from checkpoints.source import Source
from jblock.blocks.quant_spec import BOOK, CODES, SCALES, QuantSpec

_STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_DTYPES = {"float32": "", "float16": "float16", "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsAndBytes:
    """Weights of bitsandbytes; each module says itself how it is packed."""

    suffixes: tuple[str, ...] = (
        *(".weight", ".weight.absmax", ".weight.quant_map"),
        *(".weight.nested_absmax", ".weight.nested_quant_map", *_STATES),
        *(".SCB", ".weight_format"),
    )
    notes: tuple[str, ...] = ()

    def packs(self, source: Source, module: str) -> bool:
        """See Packing."""
        return any(f"{module}{s}" in source.tensors for s in (".weight.absmax", ".SCB"))

    def read(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        """See Packing."""
        if f"{module}.SCB" in source.tensors:
            codes = tensor(source, f"{module}.weight", (out, inner), "int8")
            scb = tensor(source, f"{module}.SCB", (out,), "float32")
            scales = (scb / np.float32(127))[:, None]
            return PackedModule(
                quant=QuantSpec(bits=8, group=inner), tensors={CODES: codes, SCALES: scales}
            )
        return self._four_bits(source, module, out, inner)

    def _four_bits(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        state = _state(source, module)
        block, dtype = state.get("blocksize"), state.get("dtype", "float32")
        if type(block) is not int or block < 1 or dtype not in _DTYPES:
            raise CheckpointError(
                f"{source.path}: the quant_state of {module!r} has blocksize {block!r} and dtype {dtype!r}, "
                f"which are not known; dtypes: {', '.join(_DTYPES)}"
            )
        if list(state.get("shape", ())) != [out, inner]:
            raise CheckpointError(
                f"{source.path}: the quant_state of {module!r} has shape {state.get('shape')!r}, config.json "
                f"makes it {[out, inner]}: one of the two is of another model"
            )
        count = out * inner
        packed = tensor(source, f"{module}.weight", (-(-count // 2), 1), "uint8")
        book = tensor(source, f"{module}.weight.quant_map", (16,), "float32")
        scales = _absmax(source, module, state, -(-count // block))
        quant = QuantSpec(bits=4, group=block, form="book", rounded=_DTYPES[dtype])
        return PackedModule(
            quant=quant, tensors={CODES: packed.reshape(-1), SCALES: scales, BOOK: book}
        )


def bits_and_bytes_of(given: Mapping[str, Any]) -> BitsAndBytes:
    """Reads the section of config.json."""
    return BitsAndBytes(notes=(WEIGHTS_ONLY,) if given.get("load_in_8bit") else ())


def _state(source: Source, module: str) -> dict[str, Any]:
    names = [f"{module}{s}" for s in _STATES if f"{module}{s}" in source.tensors]
    if len(names) != 1:
        raise CheckpointError(
            f"{source.path}: {module!r} has {len(names)} tensors 'quant_state', expected one: give the "
            f"whole checkpoint (config.json has a {FIELD} of bitsandbytes)"
        )
    try:
        state = json.loads(tensor(source, names[0], None, "uint8").tobytes())
    except ValueError as e:
        raise CheckpointError(f"{source.path}: {names[0]!r} is no JSON ({e}): it is damaged") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"{source.path}: {names[0]!r} is no JSON object: it is damaged")
    return state


def _absmax(source: Source, module: str, state: Mapping[str, Any], blocks: int) -> np.ndarray:
    """float32 [blocks]: the scale of each block."""
    name = f"{module}.weight.absmax"
    absmax = tensor(source, name, (blocks,), "float32", "uint8")
    if absmax.dtype == np.float32:
        return absmax
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, (int, float)):
        raise CheckpointError(
            f"{source.path}: the quant_state of {module!r} has nested_blocksize {size!r} and nested_offset "
            f"{offset!r}, and its absmax are codes: what they stand for is not known"
        )
    book = tensor(source, f"{module}.weight.nested_quant_map", (256,), "float32")
    outer = tensor(source, f"{module}.weight.nested_absmax", (-(-blocks // size),), "float32")
    return book[absmax] * np.repeat(outer, size)[:blocks] + np.float32(offset)
