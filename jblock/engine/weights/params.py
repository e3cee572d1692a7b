"""Component weights on the device, in the layout the blocks compute with.

The zoo keeps a tensor as its checkpoint had it; here projections become what `blocks/layout.py` says:
apart, laid as the matmuls there read them fastest (`Platform.out_in`), in the serving dtype.
"""

import math
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from jblock.blocks import layout
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.quantize import INT4, unpack
from jblock.blocks.spec import (
    EmbeddingSpec,
    RouterSpec,
    StitchSpec,
    UnembeddingSpec,
    stored_dtype,
)
from jblock.engine.signature import Signature
from jblock.parallel.axes import tensor_axes
from jblock.parallel.placement import SINGLE, Placement
from jblock.parallel.spread import spread

Tensors = Mapping[str, jax.Array]
_NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _placement(
    spec, name: str, shape: tuple[int, ...], dtype: str, tied: bool, placement: Placement
) -> tuple[bool, np.dtype]:
    """(transposed, dtype) on the device of one tensor of `layout.compute_shapes`."""
    platform = placement.platform
    part = name.rpartition(".")[2]
    if part == CODES:
        if stored_dtype(spec, name) != "uint8":
            return False, np.dtype(np.int8)
        if platform.name != "cpu":
            return False, INT4
        # XLA's CPU code takes int4 arrays apart one by one, in five times the time of whole bytes. Split
        # over a mesh there is a code to a byte, for halves of bytes have no axis.
        return False, np.dtype(np.uint8 if placement.rules.single else np.int8)
    if part in (SCALES, ZEROS):
        return False, np.dtype(np.float32)
    if part == ORDER:
        return False, np.dtype(np.int32)
    # Routers are float32, for their rounding would send rows to other experts; and on CPU the tables of a
    # stitch, because XLA's gather there converts a whole bf16 one first (`embedding.rows_of` goes round it).
    matrix = len(shape) == 2
    positions = isinstance(spec, StitchSpec) and name.startswith("position.")
    gathered = tied or positions or isinstance(spec, EmbeddingSpec)
    exact = not matrix or isinstance(spec, RouterSpec) or (positions and platform.name == "cpu")
    transposed = matrix and not gathered and not platform.out_in
    return transposed, _NUMPY_DTYPES["float32" if exact else dtype]


def _shape(spec, name: str, shape: tuple[int, ...], wanted: np.dtype) -> tuple[int, ...]:
    """A shape of `layout.compute_shapes` on the devices: codes, two to a byte, may be unpacked there."""
    if stored_dtype(spec, name) == "uint8" and wanted != np.uint8:
        return (shape[0], 2 * shape[1])
    return shape


def prepared(
    spec,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    tied: bool,
    placement: Placement = SINGLE,
) -> dict[str, np.ndarray]:
    """One component in the layout of the devices, in host memory.

    Args:
      spec: of the component.
      tensors: as stored, by name.
      dtype: of the matmul weights.
      tied: the component is an unembedding that shares the embedding's table as it is.
      placement: the devices they are spread over.
    """
    out = {}
    for name, value in layout.to_compute(spec, tensors).items():
        transposed, wanted = _placement(spec, name, value.shape, dtype, tied, placement)
        if _shape(spec, name, value.shape, wanted) != value.shape:
            value = unpack(value)
        axes = tensor_axes(spec, name, placement.rules, value.ndim)
        array = spread(value, [a.sources for a in axes])
        out[name] = np.ascontiguousarray(array.T if transposed else array, dtype=wanted)
    return out


def on_device(
    spec,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    tied: bool,
    placement: Placement = SINGLE,
) -> dict[str, jax.Array]:
    """The same on the devices."""
    out = {}
    for name, shape in layout.compute_shapes(spec).items():
        transposed, _ = _placement(spec, name, shape, dtype, tied, placement)
        logical = [a.logical for a in tensor_axes(spec, name, placement.rules, len(shape))]
        out[name] = placement.put(arrays[name], *logical[:: -1 if transposed else 1])
    return out


def prepare(
    spec,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    tied: bool,
    placement: Placement = SINGLE,
) -> dict[str, jax.Array]:
    """Device tensors of one component; see `prepared`."""
    arrays = prepared(spec, tensors, dtype, tied, placement)
    return on_device(spec, arrays, dtype, tied, placement)


def param_bytes(spec, dtype: str, placement: Placement = SINGLE) -> int:
    """Bytes of one component on all devices together."""
    total = 0
    for name, shape in layout.compute_shapes(spec).items():
        axes = tensor_axes(spec, name, placement.rules, len(shape))
        wanted = _placement(spec, name, shape, dtype, False, placement)[1]
        whole = _shape(spec, name, shape, wanted)
        sizes = [a.size(n) for a, n in zip(axes, whole, strict=True)]
        # Devices pack two int4 to a byte, numpy does not.
        total += math.prod(sizes) * wanted.itemsize // (2 if wanted == INT4 else 1)
    return total


def abstract_params(
    signature: Signature, placement: Placement = SINGLE
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """Shapes, dtypes and shardings of a unit's parameters, one dict an argument."""
    out = []
    whole, part = placement, None
    for indices in signature.arguments:
        spec = signature.specs[indices[0]]
        if len(indices) > 1:
            part = part or whole.expert_part(0)
        placement = part if part and len(indices) > 1 else whole
        struct = whole.struct if placement is whole else whole.stacked
        tied = signature.tied and isinstance(spec, UnembeddingSpec)
        tensors = {}
        for name, shape in layout.compute_shapes(spec).items():
            transposed, wanted = _placement(spec, name, shape, signature.dtype, tied, placement)
            axes = tensor_axes(spec, name, placement.rules, len(shape))
            order = slice(None, None, -1 if transposed else 1)
            laid = _shape(spec, name, shape, wanted)
            sizes = [a.size(n) for a, n in zip(axes, laid, strict=True)][order]
            tensors[name] = struct(sizes, wanted, *[a.logical for a in axes][order])
        out.append(tensors)
    return tuple(out)
