"""Component weights on the device, in the layout the blocks compute with.

The zoo keeps a tensor as its checkpoint had it; here projections become what `blocks/layout.py` says:
apart, laid as this machine's matmuls read them fastest (`blocks.linear.OUT_IN`), in the serving dtype.
"""

import collections
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jblock.blocks import layout
from jblock.blocks.linear import OUT_IN, PIECE_RANK
from jblock.blocks.spec import LAYER_KINDS, EmbeddingSpec, LoraSpec, RouterSpec, UnembeddingSpec
from jblock.engine.signature import LoraForm, Signature
from jblock.parallel.axes import Axis, projection_axes, tensor_axes
from jblock.parallel.placement import SINGLE, Placement
from jblock.parallel.spread import spread

Tensors = Mapping[str, jax.Array]
SlotDeltas = Mapping[int, Sequence[tuple[LoraSpec, Mapping[str, np.ndarray]]]]
_NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _placement(
    spec, name: str, shape: tuple[int, ...], dtype: str, tied: bool
) -> tuple[bool, np.dtype]:
    """(transposed, dtype) on the device of one tensor of `layout.compute_shapes`."""
    # XLA's CPU gather converts a whole bf16 table first, so tables that are gathered are float32;
    # so are routers, whose rounding would send rows to other experts.
    matrix = len(shape) == 2
    gathered = tied or isinstance(spec, EmbeddingSpec)
    exact = gathered or isinstance(spec, RouterSpec) or not matrix
    transposed = matrix and not gathered and not OUT_IN
    return transposed, _NUMPY_DTYPES["float32" if exact else dtype]


def prepare(
    spec,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    tied: bool,
    placement: Placement = SINGLE,
) -> dict[str, jax.Array]:
    """Device tensors of one component.

    Args:
      spec: of the component.
      tensors: as stored, by name.
      dtype: of the matmul weights.
      tied: the component is an unembedding that shares the embedding's table as it is.
      placement: the devices they are spread over.
    """
    out = {}
    for name, value in layout.to_compute(spec, tensors).items():
        transposed, wanted = _placement(spec, name, value.shape, dtype, tied)
        axes = tensor_axes(spec, name, placement.rules, value.ndim)
        array = spread(value, [a.sources for a in axes])
        logical = [a.logical for a in axes]
        if transposed:
            array, logical = array.T, logical[::-1]
        out[name] = placement.put(np.ascontiguousarray(array, dtype=wanted), *logical)
    return out


def abstract_params(
    signature: Signature, placement: Placement = SINGLE
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """Shapes, dtypes and shardings of a unit's parameters, one dict a component."""
    out = []
    for spec in signature.specs:
        tied = signature.tied and isinstance(spec, UnembeddingSpec)
        tensors = {}
        for name, shape in layout.compute_shapes(spec).items():
            transposed, wanted = _placement(spec, name, shape, signature.dtype, tied)
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
    out = []
    for spec, form in zip(signature.specs, signature.lora, strict=True):
        tables = {}
        for name, shape in _table_shapes(spec, form).items():
            axes = table_axes(spec, name, placement)
            sizes = [a.size(n) for a, n in zip(axes, shape, strict=True)]
            dtype = jnp.int32 if name == "pieces" else jnp.float32
            tables[name] = placement.struct(sizes, dtype, *(a.logical for a in axes))
        out.append(tables)
    return tuple(out)


def table_axes(spec, name: str, placement: Placement) -> tuple[Axis, ...]:
    """The axes of a LoRA table: what it reads or writes is split as its projection's own axis is."""
    if name == "pieces":
        return Axis(), Axis()
    target, _, side = name.rpartition(".")
    out, inner = projection_axes(spec, target, placement.rules)
    return Axis(), Axis(), inner if side == "a" else out


def _table_shapes(spec, form: LoraForm | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if form is not None and spec.kind in LAYER_KINDS:
        shapes["pieces"] = (form.slots, form.turns)
        for target in form.targets:
            out, inner = layout.compute_shapes(spec)[f"{target}.weight"]
            shapes[f"{target}.a"] = (form.pieces, PIECE_RANK, inner)
            shapes[f"{target}.b"] = (form.pieces, PIECE_RANK, out)
    return shapes


def num_pieces(deltas: Sequence[LoraSpec]) -> int:
    """Pieces one adapter needs on a component: its widest projection, all its deltas added up."""
    widths: collections.Counter[str] = collections.Counter()
    for lora in deltas:
        widths.update({name: target.rank for name, target in lora.targets.items()})
    return -(-max(widths.values()) // PIECE_RANK)


def lora_tables(
    spec, form: LoraForm | None, deltas: SlotDeltas, placement: Placement = SINGLE
) -> dict[str, jax.Array]:
    """LoRA tables of one component, as blocks/linear.py describes them.

    Args:
      spec: of the component.
      form: shape of the tables; None gives none.
      deltas: slot -> the LoRA deltas of that slot, added up by putting their ranks side by side.
      placement: the devices they are spread over.
    """
    shapes = _table_shapes(spec, form)
    tables = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    first = 1
    for slot, parts in sorted(deltas.items()) if form else ():
        count = num_pieces([lora for lora, _ in parts])
        tables["pieces"][slot, :count] = np.arange(first, first + count)
        used: collections.Counter[str] = collections.Counter()
        for lora, tensors in parts:
            for target, width in lora.targets.items():
                span = slice(used[target], used[target] + width.rank)
                used[target] = span.stop
                down = tensors[f"{target}.a"].astype(np.float32)
                up = tensors[f"{target}.b"].astype(np.float32).T * np.float32(width.scale)
                for part, outputs in layout.parts(spec, target).items():
                    for side, matrix in (("a", down), ("b", up[:, outputs])):
                        table = tables[f"{part}.{side}"][first : first + count]
                        table.reshape(count * PIECE_RANK, -1)[span] = matrix  # through a view
        first += count
    out = {}
    for name, table in tables.items():
        axes = table_axes(spec, name, placement)
        table = spread(
            table.astype(np.int32) if name == "pieces" else table, [a.sources for a in axes]
        )
        out[name] = placement.put(table, *(a.logical for a in axes))
    return out


def nbytes(tensors: Sequence[Tensors]) -> int:
    """Bytes of distinct device arrays."""
    return sum({id(a): a.nbytes for t in tensors for a in t.values()}.values())
