"""How the weights of a component are quantised. Plain data, like every spec."""

import dataclasses
import math

from jblock.blocks.rope_spec import SpecError

QUANT_BITS = (4, 8)
CODES, SCALES, ZEROS, ORDER = "codes", "scales", "zeros", "order"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Weight-only quantisation of every projection of a component, always laid [out, in]:
    `weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])` with `g = i // group_of(in)`.

    Tensors, in place of `p.weight` of a projection `p` with groups of g inputs:
      p.codes: int8 [out, in]; of 4 bits uint8 [out, in / 2], input 2j in the low half of byte j, each
        half a two's complement number.
      p.scales: float32 [out, in / g].
      p.zeros: int8 [out, in / g] if zeros; without, they are 0.
      p.order: int32 [in] if ordered: input i of the codes is input order[i] of the model (GPTQ's
        act-order, by which groups are not of neighbours).

    Attributes:
      bits: of a code, 4 or 8.
      group: inputs that share a scale; where it does not divide a projection's inputs, their greatest
        common divisor does.
      zeros: groups have zero points.
      ordered: inputs are permuted.
    """

    bits: int
    group: int
    zeros: bool = False
    ordered: bool = False

    def __post_init__(self):
        if self.bits not in QUANT_BITS:
            raise SpecError(f"bits is {self.bits!r}; give one of {', '.join(map(str, QUANT_BITS))}")
        if not isinstance(self.group, int) or self.group < 1:
            raise SpecError(f"group is {self.group!r}; give a whole number of at least 1")

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a projection of so many."""
        return math.gcd(self.group, inputs)

    def tensors(self, projection: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """Name -> stored shape of what stands for the weight of one projection.

        Raises:
          SpecError: 4 bits and an odd number of inputs.
        """
        if self.bits == 4 and inner % 2:
            raise SpecError(
                f"projection {projection!r} has {inner} inputs; 4 bits need an even number"
            )
        groups = (out, inner // self.group_of(inner))
        columns = inner // 2 if self.bits == 4 else inner
        shapes: dict[str, tuple[int, ...]] = {f"{projection}.{CODES}": (out, columns)}
        shapes[f"{projection}.{SCALES}"] = groups
        if self.zeros:
            shapes[f"{projection}.{ZEROS}"] = groups
        if self.ordered:
            shapes[f"{projection}.{ORDER}"] = (inner,)
        return shapes

    def dtype(self, name: str) -> str | None:
        """The dtype a tensor of this name is stored in; None for what is not of a quantised weight."""
        codes = "uint8" if self.bits == 4 else "int8"
        kinds = {CODES: codes, SCALES: "float32", ZEROS: "int8", ORDER: "int32"}
        return kinds.get(name.rpartition(".")[2])
