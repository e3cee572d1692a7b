"""Checkpoints that were published quantized: their packed weights as the zoo keeps quantized ones, value for
value.

Each way of packing has a file: `packed_words.py` (GPTQ, AWQ), `packed_fp8.py`, `packed_compressed.py`
(compressed-tensors), `packed_bnb.py` (bitsandbytes). What their layouts do not settle is refused, and the
message says what is not known.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packed_bnb import bits_and_bytes_of
from checkpoints.packed_compressed import compressed_tensors_of
from checkpoints.packed_fp8 import fp8_of
from checkpoints.packed_words import words_of
from checkpoints.packing import FIELD, PackedModule, Packing
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import Source
from jblock.blocks import quantize
from jblock.blocks.layout import is_projection
from jblock.blocks.quant_spec import CODES, ORDER, QuantSpec
from jblock.blocks.spec import QUANTIZABLE, AttentionSpec, FfnSpec, projection_shape
from jblock.families import Plan, PlannedStep

_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Packing]] = {
    "gptq": words_of,
    "awq": words_of,
    "fp8": fp8_of,
    "compressed-tensors": compressed_tensors_of,
    "bitsandbytes": bits_and_bytes_of,
}
# Of static activations and KV caches: neither is rounded here.
_UNUSED = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".activation_scale", ".input_scale")


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
        found = self.packing.read(self.under, module, out, inner).tensors
        part = name.rpartition(".")[2]
        if part == CODES and spec.form == "int" and spec.bits == 4:
            return quantize.pack(found[CODES])
        if part in found:
            return found[part]
        # Another projection of the component has it.
        shape = self.tensors[name].shape
        return np.arange(inner, dtype=np.int32) if part == ORDER else np.zeros(shape, np.int8)


def packing_of(config: Mapping[str, Any]) -> Packing:
    """What config.json says of packed weights.

    Raises:
      CheckpointError: a method, layout or option that is not known here.
    """
    given = config[FIELD]
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: {FIELD} is {given!r}, expected an object")
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"config.json: {FIELD} has quant_method {method!r}, whose layout is not known; known: "
            f"{', '.join(_METHODS)}: take the float checkpoint and use 'jblock convert quantize'"
        )
    return _METHODS[method](given)


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
        there = {p for p, m in modules.items() if packing.packs(source, m)}
        if not there:
            steps.append(step)
            continue
        if there != modules.keys() or not isinstance(step.spec, QUANTIZABLE):
            raise CheckpointError(
                f"{source.path}: of a {step.spec.kind} component only {sorted(there)} are packed; it has "
                f"{sorted(modules)}: all or none can be served"
            )
        read = {
            p: packing.read(source, m, *projection_shape(step.spec, p)) for p, m in modules.items()
        }
        spec = _in_common(source, step, read)
        names = {n: of for n, of in step.tensors.items() if not is_projection(step.spec, n)}
        for p, m in modules.items():
            shape = projection_shape(step.spec, p)
            inside = [f"{m}{s}" for s in packing.suffixes if f"{m}{s}" in source.tensors]
            used |= {*inside, *_empty_bias(source, m, step, p)}
            for name, stored in spec.tensors(p, *shape).items():
                part = name.rpartition(".")[2]
                virtual = f"{m}.unpacked.{part}"
                names[name], packed[virtual] = virtual, (m, spec, shape)
                dtype = np.dtype(spec.dtype(name))
                size = math.prod(stored) * dtype.itemsize
                tensors[virtual] = TensorInfo(
                    name=virtual,
                    path=source.tensors[inside[0]].path,
                    dtype=dtype,
                    shape=stored,
                    start=0,
                    end=size,
                )
        transposed = (
            {"transposed": False} if isinstance(step.spec, (AttentionSpec, FfnSpec)) else {}
        )
        made: Any = dataclasses.replace(step.spec, quant=spec, **transposed)  # type: ignore[arg-type]
        steps.append(dataclasses.replace(step, spec=made, tensors=names))
    if not packed:
        raise CheckpointError(f"{source.path}: config.json has a {FIELD}, but no tensor is packed")
    left = {n: t for n, t in source.tensors.items() if n not in used and not n.endswith(_UNUSED)}
    ends = tuple(s for s in packing.suffixes if s not in (".weight", ".scales"))
    stray = sorted(n for n in left if n.endswith(ends))
    if stray:
        raise CheckpointError(
            f"{source.path}: {stray[0]!r} is packed, which is served for attentions, ffns and experts only: "
            "take a checkpoint whose other weights are float"
        )
    made_source = UnpackedSource(
        path=source.path,
        tensors=left | tensors,
        headers=source.headers,
        notes=(*source.notes, *packing.notes),
        under=source,
        packing=packing,
        packed=packed,
    )
    return dataclasses.replace(plan, steps=tuple(steps)), made_source


def _in_common(source: Source, step: PlannedStep, modules: Mapping[str, PackedModule]) -> QuantSpec:
    """How a component is quantized, of what its projections are.

    Raises:
      CheckpointError: they differ.
    """
    quants = [m.quant for m in modules.values()]
    groups = {q.group for q in quants}
    whole = all(q.group == _inputs(step, p) for p, q in zip(modules, quants, strict=True))
    spec = dataclasses.replace(
        quants[0],
        # A scale for a whole row, of rows that differ in length.
        group=math.lcm(*groups) if quants[0].form == "int" and whole else quants[0].group,
        zeros=any(q.zeros for q in quants),
        ordered=any(q.ordered for q in quants),
    )
    like = {dataclasses.replace(q, zeros=False, ordered=False, group=1) for q in quants}
    if len(like) > 1 or (len(groups) > 1 and not (whole and spec.form == "int")):
        raise CheckpointError(
            f"{source.path}: the projections of a {step.spec.kind} component are packed in ways that differ "
            f"({', '.join(f'{p}: {m.quant}' for p, m in modules.items())}): only one way for all of them "
            "can be served"
        )
    return spec


def _inputs(step: PlannedStep, projection: str) -> int:
    return projection_shape(step.spec, projection)[1]


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
