"""Products of up to 24 rows by float32 weights in AVX-512; see `kernel`.

A vector is 4 rows of x by 4 of `in`, as rows lie anyway. Four elements of a weight, repeated four times, are
multiplied with each such vector, and a row's four sums are added at the end: so a row of x costs a quarter of
a vector, and its bits do not depend on how many others there are.

x is taken piece by piece along `in`: a third of the first cache, where it stays while a unit of columns is
read, beside the weights that come next.
"""

from llvmlite import ir

from jblock.cpu_kernels.emit import F32, I64, Function, Value
from jblock.cpu_kernels.matmul import squares
from jblock.cpu_kernels.matmul.items import UNIT, Item

_STEP = 16  # Of `in` in a turn of the inner loop: a line of the cache.
_PIECE = 1024  # Of `in` in a piece, over vectors of x.
_SIDE_BY_SIDE = {1: 4, 2: 4, 3: 8, 4: 6, 5: 5, 6: 4}
"""Rows of a weight read side by side, by vectors of x: their sums stay in 24 to 25 registers of 32."""

MOST_ROWS = 4 * max(_SIDE_BY_SIDE)


class Quads:
    """Products of one T; see `items.Kernel`."""

    weight_bytes = 4

    def __init__(self, count: int):
        self.count = count
        self.vectors = -(-count // 4)
        self.rows = _SIDE_BY_SIDE[self.vectors]
        self.piece = _PIECE // self.vectors // _STEP * _STEP

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """x as [in / 4, vectors, 4 rows, 4 of in], rows that are not there as 0."""
        b = f.b
        place = f.scratch(b.mul(width, I64(16 * self.vectors)))
        nothing = ir.Constant(ir.VectorType(F32, 4), [F32(0)] * 4)

        def lay(k: Value) -> None:
            for t in range(4 * self.vectors):
                source = b.add(b.mul(I64(t), width), b.mul(k, I64(4)))
                line = f.load(x, source, 4) if t < self.count else nothing
                f.put(line, place, b.add(b.mul(k, I64(16 * self.vectors)), I64(4 * t)))

        f.loop(b.udiv(width, I64(4)), lay)
        return place

    def compute(self, f: Function, item: Item) -> None:
        """An item, UNIT of its columns at a time."""
        b = f.b
        sums = f.scratch(64 * UNIT * self.vectors)
        spare = f.scratch(64 * 16)
        whole, rest = divmod(UNIT, self.rows)

        def unit(n: Value) -> None:
            first = b.add(item.first, b.mul(n, I64(UNIT)))
            weight = f.at(item.weight, b.mul(first, item.width), 4)
            f.loop(UNIT * self.vectors, lambda i: f.put(f.splat(0.0, 16), sums, b.mul(i, I64(16))))

            def piece(p: Value) -> None:
                start = b.mul(p, I64(self.piece))
                end = f.smaller(b.add(start, I64(self.piece)), item.width)
                along = (b.udiv(start, I64(_STEP)), b.udiv(end, I64(_STEP)))

                def group(g: Value) -> None:
                    self._add(f, item, weight, b.mul(g, I64(self.rows)), self.rows, along, sums)

                f.loop(whole, group)
                if rest:
                    self._add(f, item, weight, I64(whole * self.rows), rest, along, sums)

            f.loop(f.up(item.width, self.piece), piece)
            for half in range(0, UNIT, 16):
                y = f.at(item.y, b.add(first, I64(half)), 4)
                for v in range(self.vectors):
                    source = f.at(sums, 64 * (self.vectors * half + v))
                    squares.turn(f, source, I64(64 * self.vectors), 16, spare, I64(64), 16)
                    for t in range(4 * v, min(4 * v + 4, self.count)):
                        parts = [f.load(spare, 16 * (4 * (t - 4 * v) + i), 16) for i in range(4)]
                        total = b.fadd(b.fadd(*parts[:2]), b.fadd(*parts[2:]))
                        f.put(total, y, b.mul(I64(t), item.out))

        f.loop(b.udiv(b.sub(item.end, item.first), I64(UNIT)), unit)

    def _add(
        self,
        f: Function,
        item: Item,
        weight: Value,
        row: Value,
        rows: int,
        along: tuple[Value, Value],
        sums: Value,
    ) -> None:
        """Adds what steps [along) of `in` give to `rows` columns of y from `row` of a unit on: sums [UNIT,
        vectors, 16]."""
        b, width, vectors = f.b, item.width, self.vectors
        first = f.at(weight, b.mul(row, width), 4)
        next_rows = b.mul(I64(rows), width)
        place = f.at(sums, b.mul(row, I64(64 * vectors)))

        def step(k: Value, *so_far: Value) -> list[Value]:
            at, out = b.mul(k, I64(_STEP)), list(so_far)
            lines = [f.at(first, b.add(b.mul(I64(r), width), at), 4) for r in range(rows)]
            for line in lines:
                f.fetch(f.at(line, next_rows, 4), 1)
            x = f.at(item.x, b.mul(at, I64(16 * vectors)))
            for j in range(0, _STEP, 4):
                load_x = lambda v, j=j: f.load(x, 4 * j * vectors + 16 * v, 16)
                load_w = lambda r, j=j: f.load_repeated(lines[r], j, 4, 4)

                def add(r: int, v: int, w: Value, line: Value) -> None:
                    out[r * vectors + v] = f.fma(w, line, out[r * vectors + v])

                # The fewer of both stay in registers; the others come one after the other.
                if vectors <= rows:
                    xs = [load_x(v) for v in range(vectors)]
                    for r in range(rows):
                        w = load_w(r)
                        for v in range(vectors):
                            add(r, v, w, xs[v])
                else:
                    ws = [load_w(r) for r in range(rows)]
                    for v in range(vectors):
                        line = load_x(v)
                        for r in range(rows):
                            add(r, v, ws[r], line)
            return out

        before = [f.load(place, 16 * n, 16) for n in range(rows * vectors)]
        done = f.loop(along[1], step, before, first=along[0])
        for n, total in enumerate(done):
            f.put(total, place, 16 * n)
