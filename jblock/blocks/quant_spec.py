"""How the weights of a component are quantized. Plain data, like every spec."""

import dataclasses
import math

from jblock.blocks.rope_spec import SpecError

QUANT_BITS = (4, 8)
CODES, SCALES, ZEROS, ORDER, BOOK = "codes", "scales", "zeros", "order", "book"
QUANT_FORMS = ("int", "e4m3", "book")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Weight-only quantization of every projection of a component, always laid [out, in]:
    `weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])` with `g = i // group_of(in)`.

    Tensors, in place of `p.weight` of a projection `p` with groups of g inputs:
      p.codes: int8 [out, in]; of 4 bits uint8 [out, in / 2], input 2j in the low half of byte j, each
        half a two's complement number.
      p.scales: float32 [out, in / g].
      p.zeros: int8 [out, in / g] if zeros; without, they are 0.
      p.order: int32 [in] if ordered: input i of the codes is input order[i] of the model (GPTQ's
        act-order, by which groups are not of neighbors).

    Two more forms are those of published files. No block computes with their codes: a projection becomes
    float when it is loaded.

    "e4m3" (FP8, as DeepSeek and Qwen publish it), 8 bits, `weight[o, i] = scales[o // rows, i // group] *
    codes[o, i]`:
      p.codes: uint8 [out, in], each the bits of a float8_e4m3fn.
      p.scales: float32 [out / rows, in / group], rounded up.

    "book" (NF4 and FP4 of bitsandbytes), 4 bits, over the weight's elements n in row-major order,
    `weight[n] = book[codes[n]] * scales[n // group]`:
      p.codes: uint8 [out * in / 2], the earlier element in the high half of a byte.
      p.scales: float32 [out * in / group], rounded up.
      p.book: float32 [16].

    Attributes:
      bits: of a code, 4 or 8.
      group: inputs that share a scale; where it does not divide a projection's inputs, their greatest
        common divisor does. "e4m3": 0 is all inputs. "book": elements that share a scale.
      zeros: groups have zero points.
      ordered: inputs are permuted.
      form: "int" as above, "e4m3" or "book".
      rows: outputs that share a scale in "e4m3"; 0 is all of them.
      rounded: float dtype that the products are rounded to, as the library that wrote them does; ""
        leaves them in float32.
    """

    bits: int
    group: int
    zeros: bool = False
    ordered: bool = False
    form: str = "int"
    rows: int = 1
    rounded: str = ""

    def __post_init__(self):
        if self.form not in QUANT_FORMS:
            raise SpecError(f"form is {self.form!r}; give one of {', '.join(QUANT_FORMS)}")
        if self.rounded not in ("", "float16", "bfloat16"):
            raise SpecError(f"rounded is {self.rounded!r}; give '', 'float16' or 'bfloat16'")
        if self.bits not in QUANT_BITS:
            raise SpecError(f"bits is {self.bits!r}; give one of {', '.join(map(str, QUANT_BITS))}")
        if self.form != "int" and (self.zeros or self.ordered):
            raise SpecError(f"form {self.form!r} has no zero points and no order")
        least = 0 if self.form == "e4m3" else 1
        if not isinstance(self.group, int) or self.group < least:
            raise SpecError(f"group is {self.group!r}; give a whole number of at least {least}")

    @property
    def made_float(self) -> bool:
        """Whether projections become float when they are loaded."""
        return self.form != "int"

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a projection of so many."""
        return math.gcd(self.group, inputs)

    def tensors(self, projection: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """Name -> stored shape of what stands for the weight of one projection.

        Raises:
          SpecError: 4 bits and an odd number of inputs.
        """
        if self.form == "e4m3":
            blocks = (-(-out // (self.rows or out)), -(-inner // (self.group or inner)))
            return {f"{projection}.{CODES}": (out, inner), f"{projection}.{SCALES}": blocks}
        if self.form == "book":
            count = out * inner
            return {
                f"{projection}.{CODES}": (-(-count // 2),),
                f"{projection}.{SCALES}": (-(-count // self.group),),
                f"{projection}.{BOOK}": (16,),
            }
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
        """The dtype a tensor of this name is stored in; None for what is not of a quantized weight."""
        codes = "uint8" if self.bits == 4 or self.form == "e4m3" else "int8"
        kinds = {CODES: codes, SCALES: "float32", ZEROS: "int8", ORDER: "int32", BOOK: "float32"}
        return kinds.get(name.rpartition(".")[2])
