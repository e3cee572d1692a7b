"""Shapes, dtypes and places of the slot tables that `blocks/slots.py` reads."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks import layout
from jblock.blocks.compressed_spec import TABLE_GROUP
from jblock.blocks.delta_spec import BottleneckSpec
from jblock.blocks.slots import PIECE_RANK
from jblock.blocks.spec import ComponentSpec, UnembeddingSpec
from jblock.engine.signature import Signature, TableForm
from jblock.parallel.axes import Axis, projection_axes, tensor_axes
from jblock.parallel.placement import SINGLE, Placement
from jblock.parallel.spread import spread

PREFIX = ("prefix.k", "prefix.v")
_BOTTLENECK = f"{BottleneckSpec.kind}."
_WHOLE = Axis()


def piece_widths(spec: ComponentSpec, form: TableForm) -> dict[str, int]:
    """Width of every table with pieces, before it is spread over devices."""
    projections = layout.computed_widths(spec)
    widths: dict[str, int] = {}
    for target in form.targets:
        if target in projections:
            out, inner = projections[target]
            widths |= {f"{target}.a": inner, f"{target}.b": out}
        elif target == "prompt":
            widths["prompt"] = spec.hidden_size
        elif target == "prefix":
            widths |= {name: projections[name[-1]][0] for name in PREFIX}
        elif target.startswith(_BOTTLENECK):
            width = spec.hidden_size
            widths |= {f"{target}.a": width, f"{target}.a_bias": 1, f"{target}.b": width}
    return widths


def vector_widths(spec: ComponentSpec, form: TableForm) -> dict[str, int]:
    """Width of every table of vectors, before it is spread over devices."""
    projections = layout.computed_widths(spec)
    widths: dict[str, int] = {}
    for target in form.targets:
        projection, _, vector = target.rpartition(".")
        if has_few_bits(target):
            continue
        if target.startswith(_BOTTLENECK):
            widths[f"{target}.b_bias"] = spec.hidden_size
        elif projection in projections:
            widths[target] = projections[projection][1 if vector == "in_scale" else 0]
        elif target not in projections and target not in ("prompt", "prefix"):
            widths[target] = layout.compute_shapes(spec)[target][0]
    return widths


def bit_shapes(spec: ComponentSpec, form: TableForm) -> dict[str, tuple[tuple[int, int], np.dtype]]:
    """Shape and dtype of an entry of every table of few bits."""
    projections = layout.computed_widths(spec)
    shapes: dict[str, tuple[tuple[int, int], np.dtype]] = {}
    for target in form.targets:
        projection, _, kind = target.rpartition(".")
        if has_few_bits(target):
            out, inner = projections[projection]
            columns = inner * int(kind.removeprefix("bits")) // 8
            shapes[f"{target}.codes"] = ((out, columns), np.dtype(np.uint8))
            groups = inner // math.gcd(TABLE_GROUP, inner)
            shapes[f"{target}.scales"] = ((out, groups), np.dtype(np.float32))
    return shapes


def written_tables(kind: str, spec: ComponentSpec, form: TableForm) -> tuple[str, ...]:
    """Names of the tables that a program of a kind of `keys.WRITING` writes."""
    if kind == "write_pieces":
        return tuple(piece_widths(spec, form))
    return tuple((vector_widths if kind == "write_vectors" else bit_shapes)(spec, form))


def has_few_bits(target: str) -> bool:
    """Whether a target of `TableForm.targets` has tables of codes."""
    return target.rpartition(".")[2].startswith("bits")


def abstract_tables(
    signature: Signature, placement: Placement = SINGLE
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """Shapes, dtypes and shardings of a unit's slot tables, one dict an argument."""
    return tuple(
        table_structs(signature.specs[i], signature.forms[i], placement)
        for i, *_ in signature.arguments
    )


def table_structs(
    spec: ComponentSpec, form: TableForm | None, placement: Placement = SINGLE
) -> dict[str, jax.ShapeDtypeStruct]:
    """The slot tables of one component: shapes, dtypes and shardings by name."""
    if form is None:
        return {}
    tables: dict[str, jax.ShapeDtypeStruct] = {}
    pieces = piece_widths(spec, form)
    if pieces:
        tables["pieces"] = placement.struct((form.slots, form.turns), jnp.int32)
    if "prompt" in pieces or PREFIX[0] in pieces:
        tables["virtual"] = placement.struct((form.slots,), jnp.int32)
    for name, width in pieces.items():
        axis = _axis(spec, name, placement)
        shape = (form.pieces, PIECE_RANK, axis.size(width))
        tables[name] = placement.struct(shape, jnp.float32, None, None, axis.logical)
    for name, width in vector_widths(spec, form).items():
        axis = _axis(spec, name, placement)
        row = (form.slots, axis.size(width))
        tables[name] = placement.struct(row, jnp.float32, None, axis.logical)
    bits = bit_shapes(spec, form)
    if bits:
        tables["places"] = placement.struct((form.slots,), jnp.int32)
    for name, (entry, dtype) in bits.items():
        if not placement.rules.single:
            raise ValueError(
                "deltas of few bits have no rule for --mesh: compress to low rank instead"
            )
        tables[name] = placement.struct((form.places, *entry), dtype)
    return tables


def table_bytes(spec: ComponentSpec, form: TableForm, placement: Placement = SINGLE) -> int:
    """Bytes of the slot tables of one component on all devices together."""
    structs = table_structs(spec, form, placement).values()
    return sum(s.size * s.dtype.itemsize for s in structs)


def put_rows(spec: ComponentSpec, name: str, rows: np.ndarray, placement: Placement) -> jax.Array:
    """Rows for a table, float32 [..., width], on the devices as its last axis lies there."""
    axis = _axis(spec, name, placement)
    lead = (None,) * (rows.ndim - 1)
    return placement.put(spread(rows, [*lead, axis.sources]), *lead, axis.logical)


def _axis(spec: ComponentSpec, name: str, placement: Placement) -> Axis:
    """The last axis of a table: what it reads or writes is split as its projection's own axis is."""
    projection, _, part = name.rpartition(".")
    if isinstance(spec, UnembeddingSpec) and part != "a":
        return tensor_axes(spec, "weight", placement.rules, 2)[0]
    if name in PREFIX:
        return projection_axes(spec, part, placement.rules)[0]
    if spec.kind == "embedding" or projection not in layout.computed_widths(spec):
        return _WHOLE
    out, inner = projection_axes(spec, projection, placement.rules)
    return inner if part in ("a", "in_scale") else out
