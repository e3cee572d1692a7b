"""Products by float32 weights in AVX-512; see `matmul_kernel`.

Up to 8 rows of x: vectors along `in`, a few rows of the weight by all of x at a time, folded at the end.
More: x lies transposed, a vector is 16 of its rows, and every element of a weight is multiplied with one to
four of them. Weights of the rows to come are fetched into the second cache meanwhile, for what bounds both
is how many reads are on their way.

No more than 8 rows of a weight are read side by side: they are often a multiple of 4 KiB apart, and lie in
one set of the first cache then, which has 12 places.
"""

from llvmlite import ir

from jblock.pallas_kernels.native import squares
from jblock.pallas_kernels.native.emit import F32, I32, I64, PTR, VOID, Function, Value
from jblock.pallas_kernels.native.matmul_items import UNIT, Item

_FOLDED = 8  # Most rows of x that are summed along `in`.
_PAD = 16  # Between rows of x, so that they lie in other sets of the cache.


class Lanes:
    """Products of one T; see `matmul_items.Kernel`."""

    weight_bytes = 4

    def __init__(self, count: int):
        self.count = count
        self.columns = -(-count // 16)  # vectors of rows of x
        self.folded = count <= _FOLDED
        if self.folded:
            self.rows = 4 if count <= 6 else 3
        else:
            self.rows = 8 if self.columns <= 3 else 6

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """x with gaps between its rows, or transposed: [in, vectors, 16], rows that are not there as 0."""
        b = f.b
        if self.folded:
            stride = b.add(width, I64(_PAD))
            place = f.scratch(b.mul(stride, I64(4 * self.count)))

            def copy(k: Value) -> None:
                for t in range(self.count):
                    at = b.mul(k, I64(16))
                    row = f.load(x, b.add(b.mul(I64(t), width), at), 16)
                    f.put(row, place, b.add(b.mul(I64(t), stride), at))

            f.loop(b.udiv(width, I64(16)), copy)
            return place
        place = f.scratch(b.mul(width, I64(64 * self.columns)))
        row_bytes, gap = b.mul(width, I64(4)), I64(64 * self.columns)

        def lay(k: Value) -> None:
            for c in range(self.columns):
                source = f.at(x, b.add(b.mul(I64(16 * c), row_bytes), b.mul(k, I64(64))))
                target = f.at(place, b.add(b.mul(k, I64(16 * 64 * self.columns)), I64(64 * c)))
                squares.turn(f, source, row_bytes, min(16, self.count - 16 * c), target, gap, 16)

        f.loop(b.udiv(width, I64(16)), lay)
        return place

    def compute(self, f: Function, item: Item) -> None:
        """An item, UNIT of its columns at a time."""
        b = f.b
        lines = self.count if self.folded else self.columns
        sums = f.scratch(64 * UNIT * lines)
        group = self._fold if self.folded else self._lanes
        whole, rest = divmod(UNIT, self.rows)

        def unit(n: Value) -> None:
            first = b.add(item.first, b.mul(n, I64(UNIT)))
            weight = f.at(item.weight, b.mul(first, item.width), 4)
            f.loop(
                whole, lambda g: group(f, item, weight, b.mul(g, I64(self.rows)), self.rows, sums)
            )
            if rest:
                group(f, item, weight, I64(whole * self.rows), rest, sums)
            for half in range(0, UNIT, 16):
                y = f.at(item.y, b.add(first, I64(half)), 4)
                row_bytes = b.mul(item.out, I64(4))
                for line in range(lines):
                    if self.folded:
                        target = f.at(y, b.mul(I64(line), row_bytes))
                        squares.fold(f, f.at(sums, 64 * (UNIT * line + half)), target)
                    else:
                        source = f.at(sums, 64 * (lines * half + line))
                        target = f.at(y, b.mul(I64(16 * line), row_bytes))
                        there = min(16, self.count - 16 * line)
                        squares.turn(f, source, I64(64 * lines), 16, target, row_bytes, there)

        f.loop(b.udiv(b.sub(item.end, item.first), I64(UNIT)), unit)

    def _fold(
        self, f: Function, item: Item, weight: Value, row: Value, rows: int, sums: Value
    ) -> None:
        """`rows` columns of y from `row` of a unit on, not folded yet: sums [T, UNIT, 16]."""
        b, width = f.b, item.width
        start = f.at(weight, b.mul(row, width), 4)
        stride = b.add(width, I64(_PAD))
        zero = ir.Constant(ir.VectorType(F32, 16), [F32(0)] * 16)

        def along(k: Value, *so_far: Value) -> list[Value]:
            at = b.mul(k, I64(16))
            lines = []
            for r in range(rows):
                place = b.add(b.mul(I64(r), width), at)
                _fetch(f, f.at(start, b.add(place, b.mul(I64(rows), width)), 4))
                lines.append(f.load(start, place, 16))
            out = []
            for t in range(self.count):
                x = f.load(item.x, b.add(b.mul(I64(t), stride), at), 16)
                out += [f.fma(x, line, so_far[t * rows + r]) for r, line in enumerate(lines)]
            return out

        done = f.loop(b.udiv(width, I64(16)), along, [zero] * (self.count * rows))
        for t in range(self.count):
            for r in range(rows):
                at = b.add(row, I64(UNIT * t + r))
                f.put(done[t * rows + r], sums, b.mul(at, I64(16)))

    def _lanes(
        self, f: Function, item: Item, weight: Value, row: Value, rows: int, sums: Value
    ) -> None:
        """`rows` columns of y from `row` of a unit on, transposed: sums [UNIT, vectors, 16]."""
        b, width, columns = f.b, item.width, self.columns
        start = f.at(weight, b.mul(row, width), 4)
        zero = ir.Constant(ir.VectorType(F32, 16), [F32(0)] * 16)

        def along(k: Value, *so_far: Value) -> list[Value]:
            at, out = b.mul(k, I64(16)), list(so_far)
            places = [f.at(start, b.add(b.mul(I64(r), width), at), 4) for r in range(rows)]
            ahead = b.mul(I64(rows), width)
            for place in places:
                _fetch(f, f.at(place, ahead, 4))
            lanes = f.at(item.x, b.mul(at, I64(16 * columns)), 4)
            for j in range(16):
                xs = [f.load(lanes, 16 * (j * columns + c), 16) for c in range(columns)]
                for r, place in enumerate(places):
                    w = f.load_splat(place, j, 16)
                    for c, x in enumerate(xs):
                        out[r * columns + c] = f.fma(w, x, out[r * columns + c])
            return out

        done = f.loop(b.udiv(width, I64(16)), along, [zero] * (rows * columns))
        for r in range(rows):
            for c in range(columns):
                at = b.add(b.mul(b.add(row, I64(r)), I64(columns)), I64(c))
                f.put(done[r * columns + c], sums, b.mul(at, I64(16)))


def _fetch(f: Function, pointer: Value) -> None:
    """Asks for a cache line, to the second cache; nothing happens where there is no memory."""
    name = "llvm.prefetch.p0"
    module = f.function.module
    if name not in module.globals:
        ir.Function(module, ir.FunctionType(VOID, [PTR, I32, I32, I32]), name)
    f.b.call(module.globals[name], [pointer, I32(0), I32(2), I32(1)])
