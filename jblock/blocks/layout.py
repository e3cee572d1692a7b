"""From tensors as a checkpoint lays them out to tensors as the blocks compute with them.

Stored projections may be fused (Phi-3, GPT-2, GPT-NeoX) or lie `[in, out]` (GPT-2). Blocks know one
form: every projection apart, `[out, in]`. What is stored stays as it was, so that an export writes the
same bytes; the cut is made when a component is loaded. Codes of few bits stay as they are stored, but
for the forms that no block computes with (`QuantSpec.made_float`): these become float.
"""

from collections.abc import Mapping

import numpy as np

from jblock.blocks import quantize
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.spec import (
    LAYER_KINDS,
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    FfnSpec,
    UnembeddingSpec,
    projection_shape,
    unquantized,
)

Rows = slice | np.ndarray


def fused(spec: ComponentSpec) -> dict[str, dict[str, Rows]]:
    """Fused projections of a component: name -> the projections in it -> which of its outputs are theirs."""
    if isinstance(spec, AttentionSpec) and spec.qkv == "joined":
        return {"qkv": _consecutive(spec.widths)}
    if isinstance(spec, AttentionSpec) and spec.qkv == "by_head":
        outputs = np.arange(3 * spec.widths["q"]).reshape(spec.num_heads, 3, spec.head_dim)
        return {"qkv": {p: outputs[:, i].reshape(-1) for i, p in enumerate("qkv")}}
    if isinstance(spec, FfnSpec) and spec.joined:
        return {"gate_up": _consecutive(dict.fromkeys(("gate", "up"), spec.intermediate_size))}
    return {}


def parts(spec: ComponentSpec, projection: str) -> dict[str, Rows]:
    """The projections a stored one is computed as, and which of its outputs are theirs."""
    return fused(spec).get(projection, {projection: slice(None)})


def is_projection(spec: ComponentSpec, name: str) -> bool:
    """Whether a tensor of the component is the matrix of a projection."""
    return spec.kind in LAYER_KINDS and len(spec.tensors()[name]) == 2


def computed_widths(spec: ComponentSpec) -> dict[str, tuple[int, int]]:
    """Projections a block computes with, fused ones apart -> (out, in); "weight" where the whole
    component is one."""
    if isinstance(spec, (EmbeddingSpec, UnembeddingSpec)):
        return {"weight": projection_shape(spec, "weight")}
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in compute_shapes(unquantized(spec)).items()
        if spec.kind in LAYER_KINDS and len(shape) == 2
    }


def compute_shapes(spec: ComponentSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a block computes with; projections are [out, in]."""
    spec = _made_float(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.tensors().items():
        projection, _, tensor = name.rpartition(".")
        if tensor in (CODES, SCALES, ZEROS, ORDER):
            columns = shape[-1]
            for part, rows in parts(spec, projection).items():
                count = () if tensor == ORDER else (_count(rows, shape[0]),)
                shapes[f"{part}.{tensor}"] = (*count, columns)
        elif is_projection(spec, name):
            out, inner = shape[::-1] if getattr(spec, "transposed", False) else shape
            for part, rows in parts(spec, projection).items():
                shapes[f"{part}.weight"] = (_count(rows, out), inner)
        elif projection in fused(spec):
            for part, rows in parts(spec, projection).items():
                shapes[f"{part}.{tensor}"] = (_count(rows, shape[0]),)
        else:
            shapes[name] = shape
    return shapes


def to_compute(spec: ComponentSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stored tensors as `compute_shapes` has them; views of the given arrays where that is possible."""
    if _made_float(spec) is not spec:
        spec, tensors = _made_float(spec), floats(spec, tensors)
    out = {}
    for name, value in tensors.items():
        projection, _, tensor = name.rpartition(".")
        if tensor in (CODES, SCALES, ZEROS, ORDER):
            for part, rows in parts(spec, projection).items():
                out[f"{part}.{tensor}"] = value if tensor == ORDER else value[rows]
        elif is_projection(spec, name):
            matrix = value.T if getattr(spec, "transposed", False) else value
            for part, rows in parts(spec, projection).items():
                out[f"{part}.weight"] = matrix[rows]
        elif projection in fused(spec):
            for part, rows in parts(spec, projection).items():
                out[f"{part}.{tensor}"] = value[rows]
        else:
            out[name] = value
    return out


def floats(spec: ComponentSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stored tensors of a component, its quantized projections as float32 weights of the form and names
    that the unquantized component has."""
    quant = getattr(spec, "quant", None)
    out = {}
    for name, shape in unquantized(spec).tensors().items():
        if quant is None or name in tensors:
            out[name] = tensors[name]
        else:
            projection = name.removesuffix(".weight")
            out[name] = quantize.dequantize(tensors, projection, quant, shape[1])
    return out


def _made_float(spec: ComponentSpec) -> ComponentSpec:
    """The spec that a component is computed by."""
    quant = getattr(spec, "quant", None)
    return unquantized(spec) if quant is not None and quant.made_float else spec


def _consecutive(widths: Mapping[str, int]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    first = 0
    for name, width in widths.items():
        found[name] = slice(first, first + width)
        first += width
    return found


def _count(rows: Rows, total: int) -> int:
    return len(range(total)[rows]) if isinstance(rows, slice) else len(rows)
