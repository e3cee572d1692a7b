"""GPTQ and AWQ checkpoints: codes packed into words of 32 bits.

Layouts, as AutoGPTQ (checkpoint_format "gptq"), GPTQModel ("gptq_v2") and AutoAWQ ("gemm") document and
write them, with n = 32 / bits codes to an int32, the first in its lowest bits:

  GPTQ  qweight [in / n, out] along inputs; qzeros [groups, out / n], each zero less 1 ("gptq") or as it is
        ("gptq_v2"); scales float16 [groups, out]; g_idx int32 [in], the group of each input.
        weight[i, o] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i] (or i // group_size).
  AWQ   qweight [in, out / 8] and qzeros [groups, out / 8] along outputs, where the k-th code is of output
        (0, 2, 4, 6, 1, 3, 5, 7)[k] of its 8; scales float16 [groups, out]; 4 bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packing import FIELD, PackedModule, codes_of, order_of, tensor
from checkpoints.source import Source
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS, QuantSpec

_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """`method` "gptq" or "awq", `bits`, `group` (inputs that share a scale; 0: all), and what a stored
    zero lacks to the zero that is meant."""

    method: str
    bits: int
    group: int
    zero_offset: int = 0
    suffixes: tuple[str, ...] = (".qweight", ".qzeros", ".scales", ".g_idx")
    notes: tuple[str, ...] = ()

    def packs(self, source: Source, module: str) -> bool:
        """See Packing."""
        return f"{module}.qweight" in source.tensors

    def read(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        """See Packing."""
        n, bits = 32 // self.bits, self.bits
        group = self.group or inner
        if inner % group or out % n or inner % n:
            raise CheckpointError(
                f"{source.path}: {module!r} is {out} x {inner}, which groups of {group} or words of {n} "
                "codes do not divide: how the rest is packed is not known"
            )
        groups = inner // group
        gptq = self.method == "gptq"
        words = (inner // n, out) if gptq else (inner, out // n)
        qweight = tensor(source, f"{module}.qweight", words, "int32")
        qzeros = tensor(source, f"{module}.qzeros", (groups, out // n), "int32")
        floats = ("float16", "float32", "bfloat16")
        scales = tensor(source, f"{module}.scales", (groups, out), *floats)
        codes, zeros = (codes_of(q, bits) for q in (qweight, qzeros))
        if gptq:
            codes = codes.transpose(0, 2, 1).reshape(inner, out)
            zeros = zeros.reshape(groups, out)
        else:
            back = np.argsort(_AWQ_ORDER)
            codes, zeros = (q[..., back].reshape(len(q), out) for q in (codes, zeros))
        if self.zero_offset and (zeros == 2**bits - 1).any():
            raise CheckpointError(
                f"{source.path}: {module + '.qzeros'!r} has a zero point of {2**bits - 1}, to which 1 is to "
                f"be added: whether that is {2**bits} or 0 is not known, implementations differ; save it as "
                "gptq_v2"
            )
        order, name = None, f"{module}.g_idx"
        if name in source.tensors:
            order = order_of(source, name, tensor(source, name, (inner,), "int32"), group)
        middle = 2 ** (bits - 1)
        signed = (codes.astype(np.int16) - middle).astype(np.int8).T
        tensors = {
            CODES: np.ascontiguousarray(signed if order is None else signed[:, order]),
            SCALES: np.ascontiguousarray(scales.astype(np.float32).T),
        }
        meant = (zeros.astype(np.int16) + self.zero_offset - middle).astype(np.int8).T
        if meant.any():
            tensors[ZEROS] = np.ascontiguousarray(meant)
        if order is not None:
            tensors[ORDER] = order
        quant = QuantSpec(bits=bits, group=group, zeros=meant.any(), ordered=order is not None)
        return PackedModule(quant=quant, tensors=tensors)


def words_of(given: Mapping[str, Any]) -> Words:
    """Reads the section of config.json.

    Raises:
      CheckpointError: a layout or option that is not known.
    """
    method, bits, group = (given.get(k) for k in ("quant_method", "bits", "group_size"))
    if type(bits) is not int or bits not in ((4, 8) if method == "gptq" else (4,)):
        raise CheckpointError(
            f"config.json: {method} with bits {bits!r}: how they are packed is not known"
        )
    if type(group) is not int or not (group == -1 or group > 0):
        raise CheckpointError(
            f"config.json: {FIELD} has group_size {group!r}; expected -1 or a count"
        )
    if given.get("dynamic"):
        raise CheckpointError(f"config.json: {FIELD} has 'dynamic', whose rules are not known")
    group = max(group, 0)
    if method == "awq":
        version = str(given.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(
                f"config.json: awq of version {version!r}: only the packing of 'gemm' is known"
            )
        return Words(method="awq", bits=bits, group=group)
    layout = given.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"config.json: gptq with checkpoint_format {layout!r}, whose layout is not known; known: "
            "gptq, gptq_v2"
        )
    return Words(method="gptq", bits=bits, group=group, zero_offset=int(layout == "gptq"))
