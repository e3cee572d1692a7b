"""Products of few rows in AVX-512, by float32 weights or, with AVX-512 BF16, bfloat16 ones; see `kernel`.

What is said of words is so of both: a word is a float32 or two bfloat16, neighbors along `in`. A vector is 4
rows of x by 4 words, as rows lie anyway. Four words of a weight, repeated four times, are multiplied with
each such vector, and a row's four sums are added at the end: so a row of x costs a quarter of a vector, and
its bits do not depend on how many others there are.

x is taken piece by piece along `in`: a third of the first cache, where it stays while a unit of columns is
read, beside the weights that come next. Of more rows than sums fit registers, some come after the others,
over the same piece of the weights, which is in the cache then.
"""

import dataclasses
import itertools

from jblock.cpu_kernels.emit import I64, Function, Value
from jblock.cpu_kernels.matmul import squares
from jblock.cpu_kernels.matmul.items import UNIT, Item

_STEP = 16  # Words in a turn of the inner loop: a line of the cache.
_PIECE = 1024  # Words in a piece, over vectors of x.
_SIDE_BY_SIDE = {1: 4, 2: 4, 3: 8, 4: 6, 5: 5, 6: 4}
"""Rows of a weight read side by side, by vectors of x: their sums stay in 24 to 25 registers of 32."""

PART_ROWS = 4 * max(_SIDE_BY_SIDE)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rows of x whose sums are in registers together.

    Attributes:
      first: vectors of x before it.
      vectors: its own.
    """

    first: int
    vectors: int

    @property
    def side(self) -> int:
        """Rows of a weight read side by side."""
        return _SIDE_BY_SIDE[self.vectors]


def _parts(vectors: int) -> list[_Part]:
    """As few as may be, and as even."""
    number = -(-vectors // max(_SIDE_BY_SIDE))
    edges = [vectors * i // number for i in range(number + 1)]
    return [_Part(a, b - a) for a, b in itertools.pairwise(edges)]


class Quads:
    """Products of one T and dtype; see `items.Kernel`."""

    def __init__(self, count: int, dtype: str):
        self.count, self.dtype = count, dtype
        self.packed = 2 if dtype == "bfloat16" else 1  # elements of a word
        self.weight_bytes = 4 // self.packed
        self.vectors = -(-count // 4)
        self.parts = _parts(self.vectors)
        self.piece = _PIECE // max(p.vectors for p in self.parts) // _STEP * _STEP

    def words(self, f: Function, elements: Value) -> Value:
        """Words that so many elements take."""
        return f.b.udiv(elements, I64(self.packed))

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """x as [words / 4, vectors, 4 rows, 4 words] for one part after the other, rows that are not there
        as 0."""
        b, wide = f.b, 4 * self.packed
        words = self.words(f, width)
        place = f.scratch(b.mul(words, I64(16 * self.vectors)))
        nothing = f.splat(0.0, wide)

        def lay(k: Value) -> None:
            for part in self.parts:
                rows = self._rows(f, part, place, words)
                for i in range(4 * part.vectors):
                    t = 4 * part.first + i
                    source = b.add(b.mul(I64(t), width), b.mul(k, I64(wide)))
                    line = f.load(x, source, wide) if t < self.count else nothing
                    at = b.add(b.mul(k, I64(16 * part.vectors)), I64(4 * i))
                    f.put(line, rows, b.mul(at, I64(self.packed)), self.dtype)

        f.loop(b.udiv(words, I64(4)), lay)
        return place

    def _rows(self, f: Function, part: _Part, x: Value, words: Value) -> Value:
        """Where `lay` puts a part of x."""
        return f.at(x, f.b.mul(words, I64(16 * part.first)))

    def compute(self, f: Function, item: Item) -> None:
        """An item, UNIT of its columns at a time."""
        b, words = f.b, self.words(f, item.width)
        sums = f.scratch(64 * UNIT * self.vectors)
        spare = f.scratch(64 * 16)

        def unit(n: Value) -> None:
            first = b.add(item.first, b.mul(n, I64(UNIT)))
            weight = f.at(item.weight, b.mul(first, words), 4)
            f.loop(UNIT * self.vectors, lambda i: f.put(f.splat(0.0, 16), sums, b.mul(i, I64(16))))

            def piece(p: Value) -> None:
                start = b.mul(p, I64(self.piece))
                end = f.smaller(b.add(start, I64(self.piece)), words)
                along = (b.udiv(start, I64(_STEP)), b.udiv(end, I64(_STEP)))
                for part in self.parts:
                    self._add_unit(f, part, item, weight, along, sums)

            f.loop(f.up(words, self.piece), piece)
            for part in self.parts:
                self._finish(f, part, item, first, sums, spare)

        f.loop(b.udiv(b.sub(item.end, item.first), I64(UNIT)), unit)

    def _sums(self, f: Function, part: _Part, sums: Value) -> Value:
        """Where those of a part are: [UNIT, vectors, 16]."""
        return f.at(sums, 64 * UNIT * part.first)

    def _finish(
        self, f: Function, part: _Part, item: Item, first: Value, sums: Value, spare: Value
    ) -> None:
        """Adds each row's four sums, for a unit of columns, into y."""
        b, vectors = f.b, part.vectors
        sums = self._sums(f, part, sums)
        for half in range(0, UNIT, 16):
            y = f.at(item.y, b.add(first, I64(half)), 4)
            for v in range(vectors):
                source = f.at(sums, 64 * (vectors * half + v))
                squares.turn(f, source, I64(64 * vectors), 16, spare, I64(64), 16)
                row = 4 * (part.first + v)
                for t in range(row, min(row + 4, self.count)):
                    four = [f.load(spare, 16 * (4 * (t - row) + i), 16) for i in range(4)]
                    total = b.fadd(b.fadd(*four[:2]), b.fadd(*four[2:]))
                    f.put(total, y, b.mul(I64(t), item.out))

    def _add_unit(
        self,
        f: Function,
        part: _Part,
        item: Item,
        weight: Value,
        along: tuple[Value, Value],
        sums: Value,
    ) -> None:
        """Adds what steps [along) of the words give to a unit of columns of y."""
        whole, rest = divmod(UNIT, part.side)

        def group(g: Value) -> None:
            self._add(f, part, item, weight, f.b.mul(g, I64(part.side)), part.side, along, sums)

        f.loop(whole, group)
        if rest:
            self._add(f, part, item, weight, I64(whole * part.side), rest, along, sums)

    def _add(
        self,
        f: Function,
        part: _Part,
        item: Item,
        weight: Value,
        row: Value,
        rows: int,
        along: tuple[Value, Value],
        sums: Value,
    ) -> None:
        """Of these, to `rows` columns from `row` of the unit on."""
        b, words, vectors = f.b, self.words(f, item.width), part.vectors
        multiply = f.dot_pairs if self.packed > 1 else f.fma
        first = f.at(weight, b.mul(row, words), 4)
        next_rows = b.mul(I64(rows), words)
        place = f.at(self._sums(f, part, sums), b.mul(row, I64(64 * vectors)))
        laid = self._rows(f, part, item.x, words)

        def step(k: Value, *so_far: Value) -> list[Value]:
            at, out = b.mul(k, I64(_STEP)), list(so_far)
            lines = [f.at(first, b.add(b.mul(I64(r), words), at), 4) for r in range(rows)]
            for line in lines:
                f.fetch(f.at(line, next_rows, 4), 1)
            x = f.at(laid, b.mul(at, I64(16 * vectors)))
            for j in range(0, _STEP, 4):
                load_x = lambda v, j=j: f.load(x, 4 * j * vectors + 16 * v, 16)
                load_w = lambda r, j=j: f.load_repeated(lines[r], j, 4, 4)

                def add(r: int, v: int, w: Value, line: Value) -> None:
                    out[r * vectors + v] = multiply(w, line, out[r * vectors + v])

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
