"""GPTQ and AWQ checkpoints: their packed weights as the zoo keeps quantized ones, value for value.

Layouts, as AutoGPTQ (checkpoint_format "gptq"), GPTQModel ("gptq_v2") and AutoAWQ ("gemm") document and
write them, with n = 32 / bits codes to an int32, the first in its lowest bits:

  GPTQ  qweight [in / n, out] along inputs; qzeros [groups, out / n], each zero less 1 ("gptq") or as it is
        ("gptq_v2"); scales float16 [groups, out]; g_idx int32 [in], the group of each input.
        weight[i, o] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i] (or i // group_size).
  AWQ   qweight [in, out / 8] and qzeros [groups, out / 8] along outputs, where the k-th code is of output
        (0, 2, 4, 6, 1, 3, 5, 7)[k] of its 8; scales float16 [groups, out]; 4 bits.

What these do not settle is refused, and the message says what is not known.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import Source
from jblock.blocks import quant_spec, quantise
from jblock.blocks.layout import is_projection
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import QUANTISABLE, AttentionSpec, FfnSpec, projection_shape
from jblock.families import Plan, PlannedStep

FIELD = "quantization_config"
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a checkpoint says its weights are packed: `method` "gptq" or "awq", `bits`, `group` (inputs
    that share a scale; 0: all), and what a stored zero lacks to the zero that is meant."""

    method: str
    bits: int
    group: int
    zero_offset: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """One packed projection: int8 codes [out, in], float32 scales and int8 zeros [out, groups], int32 order
    [in] or None where groups are of neighbors."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class UnpackedSource(Source):
    """A checkpoint whose packed projections read as the zoo keeps them.

    Attributes:
      under: the checkpoint as it is.
      packing: of its packed projections.
      packed: name of a tensor made here -> its module, how it is quantized, and (out, in).
    """

    under: Source
    packing: Packing
    packed: Mapping[str, tuple[str, QuantSpec, tuple[int, int]]]

    @property
    def made(self) -> Collection[str]:
        return self.packed.keys()

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is, or the part of a packed projection that `unpacked` gave this name."""
        if name not in self.packed:
            return super().read(name)
        module, spec, (out, inner) = self.packed[name]
        found = read_module(self.under, self.packing, module, out, inner)
        match name.rpartition(".")[2]:
            case quant_spec.CODES:
                return quantise.pack(found.codes) if spec.bits == 4 else found.codes
            case quant_spec.SCALES:
                return found.scales
            case quant_spec.ZEROS:
                return found.zeros
        order = found.order
        return np.arange(inner, dtype=np.int32) if order is None else order


def packing_of(config: Mapping[str, Any]) -> Packing:
    """What config.json says of packed weights.

    Raises:
      CheckpointError: a method, layout or option that is not known here.
    """
    given = config[FIELD]
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: {FIELD} is {given!r}, expected an object")
    method = given.get("quant_method")
    bits, group = given.get("bits"), given.get("group_size")
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"config.json: {FIELD} has quant_method {method!r}, whose layout is not known; known: gptq, "
            "awq: take the float checkpoint and use 'jblock-convert quantize'"
        )
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
        return Packing(method=method, bits=bits, group=group)
    layout = given.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"config.json: gptq with checkpoint_format {layout!r}, whose layout is not known; known: "
            "gptq, gptq_v2"
        )
    return Packing(method=method, bits=bits, group=group, zero_offset=int(layout == "gptq"))


def unpacked(plan: Plan, source: Source, packing: Packing) -> tuple[Plan, UnpackedSource]:
    """The plan with quantized specs, and the source with the tensors that those want.

    Raises:
      CheckpointError: packed tensors that are incomplete, of other shapes, or not settled by the layout.
    """
    steps, used = [], set()
    tensors: dict[str, TensorInfo] = {}
    packed: dict[str, tuple[str, QuantSpec, tuple[int, int]]] = {}
    for step in plan.steps:
        modules = {
            name.removesuffix(".weight"): of.removesuffix(".weight")
            for name, of in step.tensors.items()
            if is_projection(step.spec, name)
        }
        there = {p for p, m in modules.items() if f"{m}.qweight" in source.tensors}
        if not there:
            steps.append(step)
            continue
        if there != modules.keys() or not isinstance(step.spec, QUANTISABLE):
            raise CheckpointError(
                f"{source.path}: of a {step.spec.kind} component only {sorted(there)} are packed; it has "
                f"{sorted(modules)}: all or none can be served"
            )
        read = {
            p: read_module(source, packing, m, *projection_shape(step.spec, p))
            for p, m in modules.items()
        }
        spec = QuantSpec(
            bits=packing.bits,
            group=packing.group or math.lcm(*(f.codes.shape[1] for f in read.values())),
            zeros=any(f.zeros.any() for f in read.values()),
            ordered=any(f.order is not None for f in read.values()),
        )
        names = {n: of for n, of in step.tensors.items() if not is_projection(step.spec, n)}
        for p, m in modules.items():
            shape = projection_shape(step.spec, p)
            used |= {f"{m}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
            for name, stored in spec.tensors(p, *shape).items():
                part = name.rpartition(".")[2]
                virtual = f"{m}.unpacked.{part}"
                names[name], packed[virtual] = virtual, (m, spec, shape)
                dtype = np.dtype(spec.dtype(name))
                size = math.prod(stored) * dtype.itemsize
                info = source.tensors[f"{m}.qweight"]
                tensors[virtual] = TensorInfo(
                    name=virtual, path=info.path, dtype=dtype, shape=stored, start=0, end=size
                )
            used |= _empty_bias(source, m, step, p)
        transposed = (
            {"transposed": False} if isinstance(step.spec, (AttentionSpec, FfnSpec)) else {}
        )
        made: Any = dataclasses.replace(step.spec, quant=spec, **transposed)  # type: ignore[arg-type]
        steps.append(dataclasses.replace(step, spec=made, tensors=names))
    if not packed:
        raise CheckpointError(f"{source.path}: config.json has a {FIELD}, but no tensor is packed")
    left = {n: t for n, t in source.tensors.items() if n not in used}
    stray = sorted(n for n in left if n.endswith((".qweight", ".qzeros")))
    if stray:
        raise CheckpointError(
            f"{source.path}: {stray[0]!r} is packed, which is served for attentions, ffns and experts only"
        )
    made_source = UnpackedSource(
        path=source.path,
        tensors=left | tensors,
        headers=source.headers,
        notes=source.notes,
        under=source,
        packing=packing,
        packed=packed,
    )
    return dataclasses.replace(plan, steps=tuple(steps)), made_source


def read_module(source: Source, packing: Packing, module: str, out: int, inner: int) -> Module:
    """One packed projection.

    Raises:
      CheckpointError: a tensor is missing or of another shape or dtype, or means what is not known.
    """
    n, bits = 32 // packing.bits, packing.bits
    group = packing.group or inner
    if inner % group or out % n or inner % n:
        raise CheckpointError(
            f"{source.path}: {module!r} is {out} x {inner}, which groups of {group} or words of {n} codes "
            "do not divide: how the rest is packed is not known"
        )
    groups = inner // group
    gptq = packing.method == "gptq"
    words = (inner // n, out) if gptq else (inner, out // n)
    qweight = _tensor(source, f"{module}.qweight", words, "int32")
    qzeros = _tensor(source, f"{module}.qzeros", (groups, out // n), "int32")
    scales = _tensor(source, f"{module}.scales", (groups, out), "float16", "float32", "bfloat16")
    codes, zeros = (_codes(q, bits) for q in (qweight, qzeros))
    if gptq:
        codes = codes.transpose(0, 2, 1).reshape(inner, out)
        zeros = zeros.reshape(groups, out)
    else:
        back = np.argsort(_AWQ_ORDER)
        codes, zeros = codes[..., back].reshape(inner, out), zeros[..., back].reshape(groups, out)
    if packing.zero_offset and (zeros == 2**bits - 1).any():
        raise CheckpointError(
            f"{source.path}: {module + '.qzeros'!r} has a zero point of {2**bits - 1}, to which 1 is to be "
            f"added: whether that is {2**bits} or 0 is not known, implementations differ; save it as "
            "gptq_v2"
        )
    middle = 2 ** (bits - 1)
    order = None
    if f"{module}.g_idx" in source.tensors:
        order = _order(source, _tensor(source, f"{module}.g_idx", (inner,), "int32"), module, group)
    signed = (codes.astype(np.int16) - middle).astype(np.int8).T
    return Module(
        codes=np.ascontiguousarray(signed if order is None else signed[:, order]),
        scales=np.ascontiguousarray(scales.astype(np.float32).T),
        zeros=np.ascontiguousarray(
            (zeros.astype(np.int16) + packing.zero_offset - middle).astype(np.int8).T
        ),
        order=order,
    )


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] of int32 -> uint8 [rows, columns, 32 / bits], lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)


def _order(source: Source, g_idx: np.ndarray, module: str, group: int) -> np.ndarray | None:
    """Inputs sorted by group; None where they lie so."""
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if (g_idx[order] != np.arange(len(g_idx)) // group).any():
        raise CheckpointError(
            f"{source.path}: {module + '.g_idx'!r} does not give {group} inputs to each group: what its "
            "scales belong to is not known"
        )
    return None if (order == np.arange(len(order))).all() else order


def _tensor(source: Source, name: str, shape: tuple[int, ...], *dtypes: str) -> np.ndarray:
    info = source.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is missing: give the whole checkpoint"
        )
    if info.shape != shape or info.dtype.name not in dtypes:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is {info.dtype.name} {list(info.shape)}, {FIELD} makes it "
            f"{' or '.join(dtypes)} {list(shape)}: one of the two is of another packing"
        )
    return source.read(name)


def _empty_bias(source: Source, module: str, step: PlannedStep, projection: str) -> set[str]:
    """The bias of zeros that AutoGPTQ writes for projections without one."""
    name = f"{module}.bias"
    if name not in source.tensors or f"{projection}.bias" in step.tensors:
        return set()
    if source.read(name).any():
        raise CheckpointError(
            f"{source.path}: {name!r} is not zero, and config.json describes a projection without bias"
        )
    return {name}
