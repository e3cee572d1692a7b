"""FP8 checkpoints as DeepSeek, Qwen and Mistral publish them (`quant_method` "fp8"): weights of
float8_e4m3fn with a scale for each block, or for the whole weight.

  weight            float8_e4m3fn [out, in]
  weight_scale_inv  [out / rows, in / columns] rounded up, or one number; the name notwithstanding it is
                    what the weight is multiplied with
  activation_scale  of inputs, with "static" activations; not used, for activations are not rounded here
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packing import FIELD, PackedModule, tensor
from checkpoints.source import Source
from jblock.blocks.quant_spec import CODES, SCALES, QuantSpec

E4M3 = "float8_e4m3fn"
FLOAT_SCALES = ("float32", "bfloat16", "float16")
WEIGHTS_ONLY = (
    "activations are not rounded as the checkpoint was meant to be run: only its weights are"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8:
    """`rows` outputs by `columns` inputs share a scale; 0 is all of them."""

    rows: int
    columns: int
    suffixes: tuple[str, ...] = (
        *(".weight", ".weight_scale_inv", ".activation_scale", ".input_scale"),
    )
    notes: tuple[str, ...] = (WEIGHTS_ONLY,)

    def packs(self, source: Source, module: str) -> bool:
        """See Packing."""
        return is_e4m3(source, module)

    def read(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        """See Packing."""
        scales = tensor(source, f"{module}.weight_scale_inv", None, *FLOAT_SCALES)
        return e4m3_module(source, module, (out, inner), scales, (self.rows, self.columns))


def fp8_of(given: Mapping[str, Any]) -> Fp8:
    """Reads the section of config.json.

    Raises:
      CheckpointError: a format or block that is not known.
    """
    if given.get("fmt", "e4m3") not in ("e4m3", None):
        raise CheckpointError(
            f"config.json: {FIELD} has fmt {given['fmt']!r}; of fp8 only e4m3 is known: take the "
            "checkpoint in bfloat16"
        )
    block = given.get("weight_block_size")
    if block is None:
        return Fp8(rows=0, columns=0)
    if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int for b in block):
        raise CheckpointError(
            f"config.json: {FIELD} has weight_block_size {block!r}; expected two numbers, or null"
        )
    if min(block) < 1:
        raise CheckpointError(f"config.json: {FIELD} has weight_block_size {block}: give counts")
    return Fp8(rows=block[0], columns=block[1])


def is_e4m3(source: Source, module: str) -> bool:
    """Whether the weight of a module is of float8_e4m3fn."""
    info = source.tensors.get(f"{module}.weight")
    return info is not None and info.dtype.name == E4M3


def e4m3_module(
    source: Source,
    module: str,
    shape: tuple[int, int],
    scales: np.ndarray,
    block: tuple[int, int],
) -> PackedModule:
    """A weight of float8_e4m3fn with a scale for each block of it; a block of 0 is all outputs or inputs.

    Raises:
      CheckpointError: scales of another shape, or a weight that is not finite.
    """
    (out, inner), (rows, columns) = shape, block
    wanted = (-(-out // (rows or out)), -(-inner // (columns or inner)))
    if scales.size == 1:
        scales = scales.reshape(1, 1)
    if scales.shape != wanted:
        raise CheckpointError(
            f"{source.path}: the scales of {module!r} are {list(scales.shape)}, a weight of {out} x {inner} "
            f"in blocks of {rows} x {columns} needs {list(wanted)}: config.json is of another packing"
        )
    weight = tensor(source, f"{module}.weight", shape, E4M3)
    bits = weight.view(np.uint8)
    if ((bits & 0x7F) == 0x7F).any():
        raise CheckpointError(
            f"{source.path}: tensor {module + '.weight'!r} holds NaN: it is damaged"
        )
    quant = QuantSpec(bits=8, group=columns, form="e4m3", rows=rows)
    return PackedModule(quant=quant, tensors={CODES: bits, SCALES: scales.astype(np.float32)})
