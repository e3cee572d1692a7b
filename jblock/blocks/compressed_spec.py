"""Specs of compressed fine-tunes: deltas that bring a base's weight near the fine-tune's own. Plain data.

They are lossy, so only chains with policy "near" have them. Tensors are in the orientation the blocks
compute with, [out, in], for the projections that the component stores.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jblock.blocks.rope_spec import SpecError
from jblock.blocks.spec import ComponentSpec, projection_shape

BITS = (1, 2, 4)
TABLE_GROUP = 64
"""Inputs that share a scale at least: what tables of bits on a device have a scale for."""

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankSpec:
    """`weight += b @ (scale[:, None] * a)`: the largest singular values of a difference.

    Tensors, for every projection `p` in targets: `p.a` int8 [rank, in], `p.b` int8 [out, rank],
    `p.scale` float32 [rank].

    Attributes:
      targets: projection -> rank.
    """

    kind: ClassVar[str] = "low_rank"
    targets: dict[str, int]

    def tensors(self, base: ComponentSpec) -> Shapes:
        """Name -> shape, for a delta on a component with spec `base`.

        Raises:
          SpecError: base has no projection of a target's name.
        """
        shapes: Shapes = {}
        for name, rank in sorted(self.targets.items()):
            out, inner = projection_shape(base, name)
            shapes |= {
                f"{name}.a": (rank, inner),
                f"{name}.b": (out, rank),
                f"{name}.scale": (rank,),
            }
        return shapes

    def dtype(self, name: str) -> str:
        """The dtype a tensor is stored in."""
        return "float32" if name.endswith(".scale") else "int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsTarget:
    """How a difference is written in few bits.

    Attributes:
      bits: of a code: 1 is a sign (BitDelta, arXiv 2402.10193).
      group: inputs that share a scale: TABLE_GROUP, or where that does not divide the inputs their
        greatest common divisor; 0: all of a row.
    """

    bits: int
    group: int = 0

    def __post_init__(self):
        if self.bits not in BITS or self.group not in (0, TABLE_GROUP):
            raise SpecError(
                f"codes of {self.bits!r} bits with a scale for {self.group!r} inputs are not known; give "
                f"{', '.join(map(str, BITS))} bits and 0 or {TABLE_GROUP} inputs"
            )

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a projection of so many."""
        return math.gcd(self.group, inputs)  # gcd(0, n) is n


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitDeltaSpec:
    """`weight[o, i] += scales[o, g] * (code[o, i] - (2**bits - 1) / 2)`: levels around 0, none of them 0.

    Tensors, for every projection `p` in targets: `p.codes` uint8 [out, m] with `m = in * bits / 8`, where
    input i's code lies in byte i % m, from bit bits * (i // m) on; `p.scales` float16 [out, groups].

    Attributes:
      targets: projection -> its codes.
    """

    kind: ClassVar[str] = "bits"
    targets: dict[str, BitsTarget]

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LowRankSpec.tensors`; SpecError also where inputs do not fill whole bytes."""
        shapes: Shapes = {}
        for name, target in sorted(self.targets.items()):
            out, inner = projection_shape(base, name)
            if inner * target.bits % 8:
                raise SpecError(
                    f"projection {name!r} has {inner} inputs: {target.bits} bits of each do not fill bytes"
                )
            shapes[f"{name}.codes"] = (out, inner * target.bits // 8)
            shapes[f"{name}.scales"] = (out, inner // target.group_of(inner))
        return shapes

    def dtype(self, name: str) -> str:
        """The dtype a tensor is stored in."""
        return "float16" if name.endswith(".scales") else "uint8"


def compressed_to_json(spec: LowRankSpec | BitDeltaSpec) -> dict[str, Any]:
    """Plain JSON of a spec."""
    if isinstance(spec, LowRankSpec):
        return {"kind": spec.kind, "targets": dict(sorted(spec.targets.items()))}
    targets = {n: dataclasses.asdict(t) for n, t in sorted(spec.targets.items())}
    return {"kind": spec.kind, "targets": targets}


def compressed_from_json(data: Mapping[str, Any]) -> LowRankSpec | BitDeltaSpec:
    """Inverse of `compressed_to_json`.

    Raises:
      SpecError: fields that do not fit.
    """
    try:
        targets = data["targets"]
        if data["kind"] == LowRankSpec.kind:
            if not all(type(r) is int and r > 0 for r in targets.values()):
                raise SpecError(f"ranks are {targets}; give whole numbers of at least 1")
            return LowRankSpec(targets=dict(targets))
        return BitDeltaSpec(targets={n: BitsTarget(**t) for n, t in targets.items()})
    except (TypeError, KeyError, AttributeError) as e:
        raise SpecError(f"compressed delta has missing or unknown fields: {e}") from e
