"""Products of 25 to 32 rows by float32 weights in AVX-512; see `kernel`.

x lies transposed, its rows make two vectors of 16, and every element of a weight is multiplied with both:
fewer reads than `quads` needs, but 16 rows are the least that counts.

No more than 8 rows of a weight are read side by side: they are often a multiple of 4 KiB apart, and lie in
one set of the first cache then, which has 12 places.
"""

from jblock.cpu_kernels.emit import I64, Function, Value
from jblock.cpu_kernels.matmul import squares
from jblock.cpu_kernels.matmul.items import UNIT, Item


class Lanes:
    """Products of one T; see `items.Kernel`."""

    weight_bytes = 4

    def __init__(self, count: int):
        self.count = count
        self.columns = -(-count // 16)  # vectors of rows of x
        self.rows = 8

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """x transposed: [in, vectors, 16], rows that are not there as 0."""
        b = f.b
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
        sums = f.scratch(64 * UNIT * self.columns)
        whole, rest = divmod(UNIT, self.rows)

        def unit(n: Value) -> None:
            first = b.add(item.first, b.mul(n, I64(UNIT)))
            weight = f.at(item.weight, b.mul(first, item.width), 4)

            def group(g: Value) -> None:
                self._sum(f, item, weight, b.mul(g, I64(self.rows)), self.rows, sums)

            f.loop(whole, group)
            if rest:
                self._sum(f, item, weight, I64(whole * self.rows), rest, sums)
            row_bytes = b.mul(item.out, I64(4))
            for half in range(0, UNIT, 16):
                y = f.at(item.y, b.add(first, I64(half)), 4)
                for c in range(self.columns):
                    source = f.at(sums, 64 * (self.columns * half + c))
                    target = f.at(y, b.mul(I64(16 * c), row_bytes))
                    there = min(16, self.count - 16 * c)
                    squares.turn(f, source, I64(64 * self.columns), 16, target, row_bytes, there)

        f.loop(b.udiv(b.sub(item.end, item.first), I64(UNIT)), unit)

    def _sum(
        self, f: Function, item: Item, weight: Value, row: Value, rows: int, sums: Value
    ) -> None:
        """`rows` columns of y from `row` of a unit on, transposed: sums [UNIT, vectors, 16]."""
        b, width, columns = f.b, item.width, self.columns
        start = f.at(weight, b.mul(row, width), 4)

        def along(k: Value, *so_far: Value) -> list[Value]:
            at, out = b.mul(k, I64(16)), list(so_far)
            places = [f.at(start, b.add(b.mul(I64(r), width), at), 4) for r in range(rows)]
            ahead = b.mul(I64(rows), width)
            for place in places:
                f.fetch(f.at(place, ahead, 4))
            lanes = f.at(item.x, b.mul(at, I64(16 * columns)), 4)
            for j in range(16):
                xs = [f.load(lanes, 16 * (j * columns + c), 16) for c in range(columns)]
                for r, place in enumerate(places):
                    w = f.load_splat(place, j, 16)
                    for c, x in enumerate(xs):
                        out[r * columns + c] = f.fma(w, x, out[r * columns + c])
            return out

        zero = f.splat(0.0, 16)
        done = f.loop(b.udiv(width, I64(16)), along, [zero] * (rows * columns))
        for r in range(rows):
            for c in range(columns):
                at = b.add(b.mul(b.add(row, I64(r)), I64(columns)), I64(c))
                f.put(done[r * columns + c], sums, b.mul(at, I64(16)))
