"""A thin layer over llvmlite's builder: vectors, loops with carried values, and the functions kernels need.

Vectors are explicit, so that what runs is what was written: LLVM picks registers and instructions and
nothing else, and no sum is reordered. Everything is float32 inside.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

Value = Any
"""An llvmlite value."""

VOID, PTR, I1, I8 = ir.VoidType(), ir.PointerType(), ir.IntType(1), ir.IntType(8)
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class _BFloat16(ir.types._BaseFloatType):
    """LLVM's type of bfloat16, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()
_BYTES = {"float32": (F32, 4), "bfloat16": (I16, 2), "int8": (I8, 1), "int32": (I32, 4)}


def float_bits(x: float) -> int:
    """Of x in float32."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def rounded(x: float) -> float:
    """x in float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


class Function:
    """One function under construction, and where its next instruction goes."""

    def __init__(self, module: ir.Module, name: str, args: str, returns: Any = VOID):
        """Begins a function.

        Args:
          module: it belongs to.
          name: of it.
          args: one letter an argument: p (pointer), l (int64), i (int32).
          returns: type of its result.
        """
        types = [{"p": PTR, "l": I64, "i": I32}[a] for a in args]
        self.function = ir.Function(module, ir.FunctionType(returns, types), name)
        self.function.attributes.add("nounwind")
        self.args = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())

    # Integers and pointers.

    def at(self, pointer: Value, index: Value | int, size: int = 1) -> Value:
        """pointer + index * size bytes."""
        index = I64(index) if isinstance(index, int) else self.long(index)
        return self.b.gep(pointer, [self.b.mul(index, I64(size))], source_etype=I8)

    def long(self, x: Value) -> Value:
        """x as int64."""
        return self.b.sext(x, I64) if x.type == I32 else x

    def pointer(self, base: Value, offset: int) -> Value:
        """The pointer stored `offset` bytes from base."""
        return self.b.load(self.at(base, offset), typ=PTR)

    def function_at(self, base: Value, offset: int, returns: Any, *args: Any) -> Value:
        """The pointer to a function stored `offset` bytes from base."""
        kind = ir.PointerType(ir.FunctionType(returns, args))
        return self.b.load(self.at(base, offset), typ=kind)

    def int64(self, base: Value, index: Value | int) -> Value:
        """Element `index` of int64s."""
        return self.b.load(self.at(base, index, 8), typ=I64)

    def int32(self, base: Value, index: Value | int) -> Value:
        """Element `index` of int32s, as int64."""
        return self.b.sext(self.b.load(self.at(base, index, 4), typ=I32), I64)

    def store(self, value: Value, base: Value, offset: Value | int = 0) -> None:
        """Stores a value `offset` bytes from base."""
        self.b.store(value, self.at(base, offset))

    def smaller(self, x: Value, y: Value) -> Value:
        """min of int64s."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def larger(self, x: Value, y: Value) -> Value:
        """max of int64s."""
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def up(self, x: Value, unit: int) -> Value:
        """ceil(x / unit) of what is 0 or more."""
        return self.b.udiv(self.b.add(x, I64(unit - 1)), I64(unit))

    def scratch(self, size: Value | int) -> Value:
        """That many bytes on the stack, until the function returns; aligned to 64."""
        size = I64(size) if isinstance(size, int) else size
        if isinstance(size, ir.Constant):
            with self.b.goto_entry_block():
                place = self.b.alloca(I8, size)
        else:
            place = self.b.alloca(I8, size)
        place.align = 64
        place.type = PTR  # llvmlite would give it a type that no other pointer here has.
        return place

    # Control.

    def loop(
        self,
        count: Value | int,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        *,
        first: Value | int = 0,
    ) -> list[Value]:
        """`for i in range(first, count): carried = body(i, *carried)`; returns the last of them."""
        b = self.b
        first = I64(first) if isinstance(first, int) else first
        count = I64(count) if isinstance(count, int) else count
        before = b.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(first, before)
        phis = [b.phi(c.type) for c in carried]
        for phi, c in zip(phis, carried, strict=True):
            phi.add_incoming(c, before)
        b.cbranch(b.icmp_signed("<", i, count), inside, after)
        b.position_at_end(inside)
        new = list(body(i, *phis) or ())
        i.add_incoming(b.add(i, I64(1)), b.block)
        for phi, c in zip(phis, new, strict=True):
            phi.add_incoming(c, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def when(self, condition: Value, body: Callable[[], object]) -> None:
        """`if condition: body()`."""
        with self.b.if_then(condition):
            body()

    def end(self, value: Value | None = None) -> None:
        """Returns from the function."""
        if value is None:
            self.b.ret_void()
        else:
            self.b.ret(value)

    def call(self, function: ir.Function, *args: Value) -> Value:
        """Calls another function of the module."""
        return self.b.call(function, args)

    # Vectors.

    def splat(self, x: Value | float, width: int) -> Value:
        """A vector of one value; a float is rounded to float32."""
        if isinstance(x, (int, float)):
            return ir.Constant(ir.VectorType(F32, width), [F32(rounded(float(x)))] * width)
        kind = ir.VectorType(x.type, width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, width), [0] * width))

    def iota(self, width: int) -> Value:
        """int32 0 .. width - 1."""
        return ir.Constant(ir.VectorType(I32, width), list(range(width)))

    def load(self, base: Value, index: Value | int, width: int, dtype: str = "float32") -> Value:
        """float32 vector of `width` elements of a dtype, from element `index` on."""
        kind, size = _BYTES[dtype]
        x = self.b.load(self.at(base, index, size), typ=ir.VectorType(kind, width), align=size)
        if dtype == "float32":
            return x
        wide = ir.VectorType(I32, width)
        if dtype == "int8":
            return self.b.sitofp(self.b.sext(x, wide), ir.VectorType(F32, width))
        shift = ir.Constant(wide, [16] * width)
        return self.b.bitcast(self.b.shl(self.b.zext(x, wide), shift), ir.VectorType(F32, width))

    def load_splat(self, base: Value, index: Value | int, width: int) -> Value:
        """float32 element `index`, `width` times."""
        return self.splat(self.b.load(self.at(base, index, 4), typ=F32), width)

    def load_repeated(self, base: Value, index: Value | int, width: int, times: int) -> Value:
        """float32 elements [index, index + width), one after the other `times` times."""
        x = self.load(base, index, width)
        mask = ir.Constant(ir.VectorType(I32, width * times), list(range(width)) * times)
        return self.b.shuffle_vector(x, x, mask)

    def fetch(self, pointer: Value, cache: int = 2) -> None:
        """Asks for a cache line, to the first or the second cache; nothing happens where there is no
        memory."""
        name = "llvm.prefetch.p0"
        module = self.function.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(VOID, [PTR, I32, I32, I32]), name)
        self.call(module.globals[name], pointer, I32(0), I32(4 - cache), I32(1))

    def put(self, x: Value, base: Value, index: Value | int, dtype: str = "float32") -> None:
        """Stores a float32 vector from element `index` of a dtype on, rounded to nearest even.

        What goes to int8 must be within its range.
        """
        _, size = _BYTES[dtype]
        self.b.store(self.narrow(x, dtype), self.at(base, index, size), align=size)

    def narrow(self, x: Value, dtype: str) -> Value:
        """A float32 vector in the bits of a dtype, rounded to nearest even."""
        if dtype == "float32":
            return x
        b, width = self.b, x.type.count
        wide, kind = ir.VectorType(I32, width), ir.VectorType(_BYTES[dtype][0], width)
        if dtype == "int8":
            return b.trunc(b.fptosi(self.math("rint", x), wide), kind)
        bits = b.bitcast(x, wide)
        constant = lambda c: ir.Constant(wide, [c] * width)
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        nearest = b.add(b.add(bits, constant(0x7FFF)), odd)
        bits = b.select(b.fcmp_unordered("uno", x, x), constant(0x7FC00000), nearest)
        return b.trunc(b.lshr(bits, constant(16)), kind)

    def math(self, name: str, *args: Value) -> Value:
        """An LLVM intrinsic on float32 vectors: fma, maxnum, minnum, fabs, rint, copysign."""
        return self.b.call(_intrinsic(self.b.module, f"llvm.{name}", args[0].type, len(args)), args)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, rounded once."""
        return self.math("fma", x, y, z)

    def dot_pairs(self, x: Value, y: Value, z: Value) -> Value:
        """z + x * y of float32 vectors x and y that hold two bfloat16 in each element: both products of an
        element go into its sum. AVX-512 BF16's own instruction; subnormal numbers count as 0."""
        pairs = ir.VectorType(_BFloat16(), 2 * z.type.count)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * z.type.count}"
        module = self.function.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(z.type, [z.type, pairs, pairs]), name)
        return self.call(
            module.globals[name], z, self.b.bitcast(x, pairs), self.b.bitcast(y, pairs)
        )

    def fold(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """The elements of a vector combined pairwise, halves first, to a scalar."""
        width = x.type.count
        while width > 1:
            width //= 2
            kind = ir.VectorType(I32, width)
            masks = [ir.Constant(kind, list(range(at, at + width))) for at in (0, width)]
            x = combine(*(self.b.shuffle_vector(x, x, mask) for mask in masks))
        return self.b.extract_element(x, I32(0))

    def exp(self, x: Value) -> Value:
        """exp of a float32 vector, within 2e-7 of it; 0 below -87.3; NaN stays.

        The polynomial is that of Cephes' expf (S. Moshier, 1992).
        """
        b, n = self.b, x.type.count
        c = functools.partial(self.splat, width=n)
        inside = self.math("maxnum", self.math("minnum", x, c(88.0)), c(-88.0))
        power = self.math("rint", b.fmul(inside, c(1.44269504088896341)))
        r = self.fma(power, c(-0.693359375), x)
        r = self.fma(power, c(2.12194440e-4), r)
        p = c(1.9875691500e-4)
        for term in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            p = self.fma(p, r, c(term))
        p = b.fadd(self.fma(b.fmul(r, r), p, r), c(1.0))
        wide = ir.VectorType(I32, n)
        exponent = b.add(b.fptosi(power, wide), ir.Constant(wide, [127] * n))
        scale = b.bitcast(b.shl(exponent, ir.Constant(wide, [23] * n)), x.type)
        return b.select(b.fcmp_ordered("<", x, c(-87.3)), c(0.0), b.fmul(p, scale))

    def tanh(self, x: Value) -> Value:
        """tanh of a float32 vector; NaN stays. Near 0 the polynomial of Cephes' tanhf."""
        b = self.b
        c = functools.partial(self.splat, width=x.type.count)
        size = self.math("fabs", x)
        capped = b.select(b.fcmp_ordered(">", size, c(10.0)), c(10.0), size)
        e = self.exp(b.fadd(capped, capped))
        large = b.fsub(c(1.0), b.fdiv(c(2.0), b.fadd(e, c(1.0))))
        z = b.fmul(x, x)
        p = c(-5.70498872745e-3)
        for term in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            p = self.fma(p, z, c(term))
        small = self.fma(b.fmul(p, z), size, size)
        out = b.select(b.fcmp_ordered("<", size, c(0.625)), small, large)
        return self.math("copysign", out, x)


def _intrinsic(module: ir.Module, name: str, kind: Any, count: int) -> ir.Function:
    full = f"{name}.v{kind.count}f32"
    if full in module.globals:
        return module.globals[full]
    return ir.Function(module, ir.FunctionType(kind, [kind] * count), full)
