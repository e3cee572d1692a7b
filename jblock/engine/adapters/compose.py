"""What a chain's deltas on one component become in the slot tables.

Deltas act one after another, each on what the ones before it made of the component. With their scales
taken out to both sides, a projection stays `scale * (W + b @ a) @ (in_scale * x) + bias` however many
there are, which is what blocks/linear.py computes.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jblock.blocks import compress, layout, quantize
from jblock.blocks.compressed_spec import TABLE_GROUP, BitDeltaSpec, BitsTarget, LowRankSpec
from jblock.blocks.delta_spec import (
    BiasNormSpec,
    BottleneckSpec,
    DeltaSpec,
    Ia3Spec,
    LoraSpec,
    LoraTarget,
    PrefixSpec,
    PromptSpec,
)
from jblock.blocks.slots import PIECE_RANK
from jblock.blocks.spec import ComponentSpec, unquantized
from jblock.zoo.records import ZooError

Tensors = Mapping[str, np.ndarray]
ReadBase = Callable[[str], np.ndarray]
"""A stored tensor of the component by its name."""


@dataclasses.dataclass(frozen=True)
class SlotContent:
    """One chain's part of the tables of one component.

    Attributes:
      pieces: float32 [n, PIECE_RANK, width] by table; the same n in all.
      vectors: float32 [width] by table.
      virtual: virtual tokens its sequences begin with.
      bits: uint8 codes and float32 scales by table.
    """

    pieces: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    virtual: int = 0
    bits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_pieces(self) -> int:
        """Pieces it takes."""
        return len(next(iter(self.pieces.values()))) if self.pieces else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(
            a.nbytes for part in (self.pieces, self.vectors, self.bits) for a in part.values()
        )


def targets(spec: ComponentSpec, deltas: Sequence[DeltaSpec]) -> frozenset[str]:
    """What needs tables for these deltas, as `TableForm.targets` names it: a stored projection or vector
    may be several computed ones."""
    found: set[str] = set()

    def add(projection: str, suffix: str = "") -> None:
        found.update(f"{part}{suffix}" for part in layout.parts(spec, projection))

    for delta in deltas:
        if isinstance(delta, LoraSpec):
            for name, target in delta.targets.items():
                add(name)
                if target.dora:
                    add(name, ".scale")
                if target.bias:
                    add(name, ".bias")
        elif isinstance(delta, LowRankSpec):
            for name in delta.targets:
                add(name)
        elif isinstance(delta, BitDeltaSpec):
            for name, codes in delta.targets.items():
                add(name, f".bits{codes.bits}")
        elif isinstance(delta, Ia3Spec):
            for name in delta.outputs:
                add(name, ".scale")
                before = {f"{p}.bias" for p in layout.parts(spec, name)} & found
                if before or f"{name}.bias" in spec.tensors():
                    add(name, ".bias")  # which is scaled too
            for name in delta.inputs:
                add(name, ".in_scale")
        elif isinstance(delta, BiasNormSpec):
            for name in delta.names:
                projection, _, tensor = name.rpartition(".")
                if projection:
                    add(projection, f".{tensor}")
                else:
                    found.add(tensor)
        elif isinstance(delta, BottleneckSpec):
            found.add(delta.target)
        else:
            found.add(delta.kind)
    return frozenset(found)


def num_pieces(deltas: Sequence[DeltaSpec]) -> int:
    """Pieces a chain needs on a component: its widest projection, all its deltas added up, or its
    virtual tokens."""
    widths: collections.Counter[str] = collections.Counter()
    for delta in deltas:
        if isinstance(delta, LoraSpec):
            widths.update({name: target.rank for name, target in delta.targets.items()})
        elif isinstance(delta, LowRankSpec):
            widths.update(delta.targets)
        elif isinstance(delta, (PromptSpec, PrefixSpec)):
            widths[delta.kind] += delta.tokens
        elif isinstance(delta, BottleneckSpec):
            widths[delta.kind] += delta.rank
    return -(-max(widths.values(), default=0) // PIECE_RANK)


def virtual_tokens(deltas: Sequence[DeltaSpec]) -> int:
    """Virtual tokens that sequences with these deltas on a component begin with."""
    return max((d.tokens for d in deltas if isinstance(d, (PromptSpec, PrefixSpec))), default=0)


def slot_content(
    spec: ComponentSpec, deltas: Sequence[tuple[DeltaSpec, Tensors]], read_base: ReadBase
) -> SlotContent:
    """One chain's deltas on one component, ready for its slot tables.

    Raises:
      ZooError: deltas that cannot act on each other, or that make a vector that is not finite.
    """
    work = _Composition(spec, read_base)
    for delta, tensors in deltas:
        work.add(delta, tensors)
    return work.content(num_pieces([delta for delta, _ in deltas]))


def _reading_floats(spec: ComponentSpec, read_base: ReadBase) -> ReadBase:
    """`read_base`, to which the projections of a quantized component are the weights they stand for: DoRA
    needs these."""
    quant = getattr(spec, "quant", None)
    if quant is None:
        return read_base
    stored, plain = spec.tensors(), unquantized(spec).tensors()

    def read(name: str) -> np.ndarray:
        if name in stored:
            return read_base(name)
        projection, (out, inner) = name.removesuffix(".weight"), plain[name]
        tensors = {n: read_base(n) for n in quant.tensors(projection, out, inner)}
        return quantize.dequantize(tensors, projection, quant, inner)

    return read


class _Projection:
    """A stored projection with what the deltas so far made of it."""

    def __init__(self, name: str, spec: ComponentSpec, read_base: ReadBase):
        self.name, self._spec, self._read_base = name, spec, read_base
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []  # a [r, in], b [out, r]
        self.scale: np.ndarray | None = None  # [out]
        self.in_scale: np.ndarray | None = None  # [in]
        self.new_bias: np.ndarray | None = None  # [out]
        self.bits: dict[str, np.ndarray] = {}  # by the last parts of the tables' names

    @property
    def bias(self) -> np.ndarray | None:
        """[out], or None without."""
        if self.new_bias is None and f"{self.name}.bias" in self._spec.tensors():
            return _float32(self._read_base(f"{self.name}.bias"))
        return self.new_bias

    def add_lora(self, a: np.ndarray, b: np.ndarray) -> None:
        """Adds `b @ a`, b with its scale, to what is projected with."""
        inside_a = a if self.in_scale is None else a / _divisor(self.in_scale, self.name)
        inside_b = b if self.scale is None else b / _divisor(self.scale, self.name)[:, None]
        self.pairs.append((inside_a, inside_b))

    def add_bits(self, codes: np.ndarray, scales: np.ndarray, target: BitsTarget) -> None:
        """Adds a difference of few bits to what is projected with.

        Raises:
          ZooError: an earlier delta scales it, or has codes of as many bits.
        """
        if self.scale is not None or self.in_scale is not None or f"bits{target.bits}" in self.bits:
            raise ZooError(
                f"a compressed delta on {self.name!r} has to come before what scales it, and once"
            )
        # Tables have a scale for TABLE_GROUP inputs, the delta perhaps one for all.
        inputs = codes.shape[1] * 8 // target.bits
        groups = inputs // math.gcd(TABLE_GROUP, inputs)
        self.bits[f"bits{target.bits}.codes"] = codes
        self.bits[f"bits{target.bits}.scales"] = np.repeat(
            _float32(scales), groups // scales.shape[1], axis=1
        )

    def add_dora(self, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> None:
        """Scales every column of what is projected with, `b @ a` added, to its magnitude."""
        if self.bits:
            raise ZooError(f"DoRA on a compressed delta of {self.name!r} cannot be served")
        weight = self._weight()
        norms = np.empty(len(magnitude), np.float32)
        rows = max(1, (1 << 22) // a.shape[1])
        for begin in range(0, len(norms), rows):  # a part at a time, as large tables are
            part = slice(begin, begin + rows)
            norms[part] = np.linalg.norm(self._effective(weight[part], part) + b[part] @ a, axis=1)
        self.add_lora(a, b)
        self.scale_by(magnitude / norms)

    def scale_by(self, scale: np.ndarray) -> None:
        """Multiplies what is projected, the bias apart."""
        self.scale = scale if self.scale is None else self.scale * scale

    def _weight(self) -> np.ndarray:
        """[out, in] as the component has it."""
        if self.name == "weight":
            weight = self._read_base("weight")
            return weight.T if self._spec.kind == "embedding" else weight
        weight = self._read_base(f"{self.name}.weight")
        return weight.T if getattr(self._spec, "transposed", False) else weight

    def _effective(self, weight: np.ndarray, part: slice) -> np.ndarray:
        """Rows of the weight, with what earlier deltas made of them."""
        weight = _float32(weight)
        if self.in_scale is not None:
            weight = weight * self.in_scale
        for a, b in self.pairs:
            weight = weight + b[part] @ (a if self.in_scale is None else a * self.in_scale)
        return weight if self.scale is None else weight * self.scale[part, None]


class _Composition:
    """The component with the deltas so far."""

    def __init__(self, spec: ComponentSpec, read_base: ReadBase):
        self._spec, self._read_base = unquantized(spec), _reading_floats(spec, read_base)
        self._projections: dict[str, _Projection] = {}
        self._vectors: dict[str, np.ndarray] = {}
        self._rows: dict[str, np.ndarray] = {}  # [rows, width] by table of pieces
        self._virtual = 0
        self._bottleneck = False

    def add(self, delta: DeltaSpec, tensors: Tensors) -> None:
        """Lets one more delta act."""
        if isinstance(delta, LoraSpec):
            for name, target in delta.targets.items():
                self._add_lora(self._projection(name), target, tensors)
        elif isinstance(delta, LowRankSpec):
            for name in delta.targets:
                self._projection(name).add_lora(*compress.low_rank_factors(tensors, name))
        elif isinstance(delta, BitDeltaSpec):
            for name, codes in delta.targets.items():
                self._projection(name).add_bits(
                    tensors[f"{name}.codes"], tensors[f"{name}.scales"], codes
                )
        elif isinstance(delta, Ia3Spec):
            for name in delta.outputs:
                projection, scale = self._projection(name), _float32(tensors[f"{name}.scale"])[:, 0]
                if projection.bias is not None:
                    projection.new_bias = projection.bias * scale
                projection.scale_by(scale)
            for name in delta.inputs:
                projection, scale = (
                    self._projection(name),
                    _float32(tensors[f"{name}.in_scale"])[0],
                )
                before = projection.in_scale
                projection.in_scale = scale if before is None else before * scale
        elif isinstance(delta, BiasNormSpec):
            for name in delta.names:
                stem, _, tensor = name.rpartition(".")
                if tensor == "bias" and f"{stem}.weight" in self._matrices:
                    self._projection(stem).new_bias = _float32(tensors[name])
                else:
                    self._vectors[name] = _float32(tensors[name])
        elif isinstance(delta, BottleneckSpec):
            self._add_bottleneck(delta, tensors)
        else:
            if self._virtual:
                raise ZooError("two prompts or prefixes on one model cannot be served")
            self._virtual = delta.tokens
            for tensor, value in tensors.items():
                table = "prompt" if tensor == "prompt" else f"prefix.{tensor}"
                self._rows[table] = _float32(value)

    def content(self, count: int) -> SlotContent:
        """What all of it needs in the tables, with `count` pieces."""
        pieces: dict[str, np.ndarray] = {}
        vectors = dict(self._vectors)
        bits: dict[str, np.ndarray] = {}
        for name, projection in self._projections.items():
            for part, outputs in layout.parts(self._spec, name).items():
                if projection.pairs:
                    pieces[f"{part}.a"] = _pieces([a for a, _ in projection.pairs], count)
                    halves = [np.ascontiguousarray(b[outputs].T) for _, b in projection.pairs]
                    pieces[f"{part}.b"] = _pieces(halves, count)
                bits |= {
                    f"{part}.{table}": rows[outputs] for table, rows in projection.bits.items()
                }
                if projection.scale is not None:
                    vectors[f"{part}.scale"] = projection.scale[outputs]
                if projection.in_scale is not None:
                    vectors[f"{part}.in_scale"] = projection.in_scale
                if projection.new_bias is not None:
                    vectors[f"{part}.bias"] = projection.new_bias[outputs]
        for table, rows in self._rows.items():
            pieces[table] = _pieces([rows], count)
        for name, vector in vectors.items():
            if not np.isfinite(vector).all():
                raise ZooError(f"its {name!r} is not finite: a norm of zero, or damaged numbers")
        return SlotContent(pieces, vectors, self._virtual, bits)

    @property
    def _matrices(self) -> set[str]:
        return {n for n, shape in self._spec.tensors().items() if len(shape) == 2}

    def _projection(self, name: str) -> _Projection:
        if name not in self._projections:
            self._projections[name] = _Projection(name, self._spec, self._read_base)
        return self._projections[name]

    def _add_bottleneck(self, spec: BottleneckSpec, tensors: Tensors) -> None:
        if self._bottleneck:
            raise ZooError("two bottleneck adapters behind one component cannot be served")
        self._bottleneck = True
        scale = np.float32(spec.scale) * _float32(tensors["scales"] if spec.scales else np.ones(1))
        self._rows[f"{spec.target}.a"] = _float32(tensors["a"])
        self._rows[f"{spec.target}.a_bias"] = _float32(tensors["a_bias"])[:, None]
        self._rows[f"{spec.target}.b"] = (scale[:, None] * _float32(tensors["b"])).T
        self._vectors[f"{spec.target}.b_bias"] = scale * _float32(tensors["b_bias"])

    def _add_lora(self, projection: _Projection, target: LoraTarget, tensors: Tensors) -> None:
        name = projection.name
        a = _float32(tensors[f"{name}.a"])
        b = _float32(tensors[f"{name}.b"]) * np.float32(target.scale)
        if target.dora:
            projection.add_dora(a, b, _float32(tensors[f"{name}.magnitude"]))
        else:
            projection.add_lora(a, b)
        if target.bias:
            more = _float32(tensors[f"{name}.b_bias"]) * np.float32(target.scale)
            before = projection.bias
            projection.new_bias = more if before is None else before + more


def _pieces(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """[rows, width] arrays one below the other, cut into pieces and filled up with zeros."""
    out = np.zeros((count * PIECE_RANK, parts[0].shape[1]), np.float32)
    used = 0
    for rows in parts:
        out[used : used + len(rows)] = rows
        used += len(rows)
    return out.reshape(count, PIECE_RANK, -1)


def _float32(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float32, copy=False)


def _divisor(scale: np.ndarray, name: str) -> np.ndarray:
    if not scale.all():
        raise ZooError(
            f"a delta scales {name!r} by 0, and a later one adds to it: merge the first into the base"
        )
    return scale
