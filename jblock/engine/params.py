"""Component weights on the device, in the layout the blocks compute with.

The zoo keeps a tensor as its checkpoint had it; here projections become what `blocks/layout.py` says:
apart, laid as the matmuls there read them fastest (`Platform.out_in`), in the serving dtype.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jblock.blocks import layout
from jblock.blocks.linear import PIECE_RANK
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.quantise import INT4
from jblock.blocks.spec import (
    LAYER_KINDS,
    EmbeddingSpec,
    LoraSpec,
    RouterSpec,
    StitchSpec,
    UnembeddingSpec,
    stored_dtype,
)
from jblock.engine.signature import LoraForm, Signature
from jblock.parallel.axes import Axis, projection_axes, tensor_axes
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
        # jax 0.10 takes no sharded int4 arrays on CPU: programs want a layout that no array gets.
        four = stored_dtype(spec, name) == "uint8"
        packed = four and (placement.rules.single or platform.name != "cpu")
        return False, INT4 if packed else np.dtype(np.int8)
    if part in (SCALES, ZEROS):
        return False, np.dtype(np.float32)
    if part == ORDER:
        return False, np.dtype(np.int32)
    # XLA's CPU gather converts a whole bf16 table first, so there tables that are gathered are float32;
    # routers are everywhere, for their rounding would send rows to other experts.
    matrix = len(shape) == 2
    positions = isinstance(spec, StitchSpec) and name.startswith("position.")
    gathered = tied or positions or isinstance(spec, EmbeddingSpec)
    exact = not matrix or isinstance(spec, RouterSpec) or (gathered and platform.name == "cpu")
    transposed = matrix and not gathered and not platform.out_in
    return transposed, _NUMPY_DTYPES["float32" if exact else dtype]


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
        sizes = [a.size(n) for a, n in zip(axes, shape, strict=True)]
        wanted = _placement(spec, name, shape, dtype, False, placement)[1]
        # Devices pack two int4 to a byte, numpy does not.
        total += math.prod(sizes) * wanted.itemsize // (2 if wanted == INT4 else 1)
    return total


def abstract_params(
    signature: Signature, placement: Placement = SINGLE
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """Shapes, dtypes and shardings of a unit's parameters, one dict a component."""
    out = []
    for spec in signature.specs:
        tied = signature.tied and isinstance(spec, UnembeddingSpec)
        tensors = {}
        for name, shape in layout.compute_shapes(spec).items():
            transposed, wanted = _placement(spec, name, shape, signature.dtype, tied, placement)
            axes = tensor_axes(spec, name, placement.rules, len(shape))
            order = slice(None, None, -1 if transposed else 1)
            sizes = [a.size(n) for a, n in zip(axes, shape, strict=True)][order]
            tensors[name] = placement.struct(sizes, wanted, *[a.logical for a in axes][order])
        out.append(tensors)
    return tuple(out)


def abstract_tables(
    signature: Signature, placement: Placement = SINGLE
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """Shapes, dtypes and shardings of a unit's LoRA tables, one dict a component."""
    return tuple(
        table_structs(spec, form, placement)
        for spec, form in zip(signature.specs, signature.lora, strict=True)
    )


def table_structs(
    spec, form: LoraForm | None, placement: Placement = SINGLE
) -> dict[str, jax.ShapeDtypeStruct]:
    """The LoRA tables of one component: shapes, dtypes and shardings by name."""
    tables = {}
    for name, shape in _table_shapes(spec, form).items():
        axes = table_axes(spec, name, placement)
        sizes = [a.size(n) for a, n in zip(axes, shape, strict=True)]
        dtype = jnp.int32 if name == "pieces" else jnp.float32
        tables[name] = placement.struct(sizes, dtype, *(a.logical for a in axes))
    return tables


def table_axes(spec, name: str, placement: Placement) -> tuple[Axis, ...]:
    """The axes of a LoRA table: what it reads or writes is split as its projection's own axis is."""
    if name == "pieces":
        return Axis(), Axis()
    target, _, side = name.rpartition(".")
    out, inner = projection_axes(spec, target, placement.rules)
    return Axis(), Axis(), inner if side == "a" else out


def piece_shapes(spec, form: LoraForm | None) -> dict[str, tuple[int, ...]]:
    """[PIECE_RANK, width] of every table with pieces, before it is spread over devices."""
    shapes = _table_shapes(spec, form)
    return {name: shape[1:] for name, shape in shapes.items() if name != "pieces"}


def put_pieces(spec, name: str, pieces: np.ndarray, placement: Placement) -> jax.Array:
    """Some pieces of a table, float32 [n, PIECE_RANK, width], on the devices as the table lies there."""
    axes = table_axes(spec, name, placement)
    return placement.put(spread(pieces, [a.sources for a in axes]), *(a.logical for a in axes))


def _table_shapes(spec, form: LoraForm | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the LoRA tables of one component, as blocks/linear.py describes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    if form is not None and spec.kind in LAYER_KINDS:
        shapes["pieces"] = (form.slots, form.turns)
        for target in form.targets:
            out, inner = layout.projection(spec, target)
            shapes[f"{target}.a"] = (form.pieces, PIECE_RANK, inner)
            shapes[f"{target}.b"] = (form.pieces, PIECE_RANK, out)
    return shapes


def computed_targets(spec, lora: LoraSpec) -> frozenset[str]:
    """The projections a delta adapts, as they are computed: a stored one may be several."""
    return frozenset(part for t in lora.targets for part in layout.parts(spec, t))


def num_pieces(deltas: Sequence[LoraSpec]) -> int:
    """Pieces one adapter needs on a component: its widest projection, all its deltas added up."""
    widths: collections.Counter[str] = collections.Counter()
    for lora in deltas:
        widths.update({name: target.rank for name, target in lora.targets.items()})
    return -(-max(widths.values()) // PIECE_RANK)


def adapter_pieces(
    spec,
    parts: Sequence[tuple[LoraSpec, Mapping[str, np.ndarray]]],
) -> dict[str, np.ndarray]:
    """One adapter's pieces on one component, for its LoRA tables.

    Args:
      spec: of the component.
      parts: its deltas there, added up by putting their ranks side by side.

    Returns:
      float32 [pieces, PIECE_RANK, width] for each projection computed, as "TARGET.a" and "TARGET.b";
      the scale is folded into b.
    """
    count = num_pieces([lora for lora, _ in parts])
    out: dict[str, np.ndarray] = {}
    used: collections.Counter[str] = collections.Counter()
    for lora, tensors in parts:
        for target, width in lora.targets.items():
            span = slice(used[target], used[target] + width.rank)
            used[target] = span.stop
            down = tensors[f"{target}.a"].astype(np.float32, copy=False)
            up = tensors[f"{target}.b"].astype(np.float32).T * np.float32(width.scale)
            for part, outputs in layout.parts(spec, target).items():
                for side, matrix in (("a", down), ("b", up[:, outputs])):
                    name = f"{part}.{side}"
                    if name not in out:
                        out[name] = np.zeros((count, PIECE_RANK, matrix.shape[1]), np.float32)
                    out[name].reshape(count * PIECE_RANK, -1)[span] = matrix  # through a view
    return out
