"""Products by AMX's bfloat16 tiles; see `kernel`.

With few rows the time is that of reading the weights, so they are read once, where they lie: tiles of 16
of their rows by 32 of `in`. x is rounded to bfloat16 and laid in pairs of `in` first, as the other side
of a tile product wants item. An output is one sum in the same order whatever T is, so a row has the same
bits in every batch.
"""

from llvmlite import ir

from jblock.cpu_kernels.emit import I8, I16, I32, I64, VOID, Function, Value
from jblock.cpu_kernels.matmul import squares
from jblock.cpu_kernels.matmul.items import Item


class Tiles:
    """Products of one T, 16 weight rows by 16 rows of x, 32 of `in` at a time; see `items.Kernel`."""

    weight_bytes = 2

    def __init__(self, count: int):
        self.count = count
        self.columns = -(-count // 16)  # tiles of rows of x

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """x in bfloat16, as pairs of `in`: [tile of rows, in / 2, 16 rows, 2]; rows that are not there are 0.

        A tile of 16 rows by 16 pairs is transposed at a time.
        """
        b = f.b
        total = b.mul(b.mul(width, I64(32)), I64(self.columns))
        place = f.scratch(total)
        square = f.scratch(1024)
        both = ir.Constant(ir.VectorType(I32, 32), list(range(32)))

        def lay(k: Value) -> None:
            for column in range(self.columns):
                there = min(16, self.count - 16 * column)
                for t in range(there):
                    row = b.add(b.mul(I64(16 * column + t), width), b.mul(k, I64(32)))
                    halves = [f.load(x, b.add(row, I64(16 * h)), 16) for h in range(2)]
                    narrow = [f.narrow(half, "bfloat16") for half in halves]
                    b.store(b.shuffle_vector(*narrow, both), f.at(square, 64 * t), align=64)
                # Pair k / 2 + p of a column: 16 rows of 4 bytes.
                at = b.add(b.mul(k, I64(1024)), b.mul(width, I64(32 * column)))
                squares.turn(f, square, I64(64), there, f.at(place, at), I64(64), 16)

        f.loop(b.udiv(width, I64(32)), lay)
        return place

    def compute(self, f: Function, item: Item) -> None:
        """An item, 32 of its columns at a time."""
        b, width = f.b, item.width
        config = f.scratch(64)
        for at in range(0, 64, 8):
            f.store(I64(0), config, at)
        f.store(I8(1), config, 0)
        for tile in range(8):
            f.store(I16(64), config, 16 + 2 * tile)
            f.store(I8(16), config, 48 + tile)
        _amx(f, "ldtilecfg", config)
        square = f.scratch(1024)
        row_bytes = b.mul(width, I64(2))
        # Two tiles of weights by one or two of x: sums in 0 .. 3, weights in 4 and 5, x in 6 and 7.
        groups = [(c, min(2, self.columns - c)) for c in range(0, self.columns, 2)]

        def rows(n: Value) -> None:
            o = b.add(item.first, b.mul(n, I64(32)))
            weights = f.at(item.weight, b.mul(o, width), 2)
            for column, wide in groups:
                for tile in range(2 * wide):
                    _amx(f, "tilezero", I8(tile))

                def along(k: Value, column=column, wide=wide) -> None:
                    w = f.at(weights, b.mul(k, I64(64)))
                    for r in range(2):
                        tile = f.at(w, b.mul(I64(16 * r), row_bytes))
                        _amx(f, "tileloadd64", I8(4 + r), tile, row_bytes)
                    for c in range(wide):
                        at = b.add(b.mul(width, I64(32 * (column + c))), b.mul(k, I64(1024)))
                        _amx(f, "tileloadd64", I8(6 + c), f.at(item.x, at), I64(64))
                        for r in range(2):
                            _amx(f, "tdpbf16ps", I8(2 * c + r), I8(4 + r), I8(6 + c))

                f.loop(b.udiv(width, I64(32)), along)
                for c in range(wide):
                    for r in range(2):
                        _amx(f, "tilestored64", I8(2 * c + r), square, I64(64))
                        t = 16 * (column + c)
                        y = f.at(item.y, b.add(b.mul(I64(t), item.out), b.add(o, I64(16 * r))), 4)
                        there = min(16, self.count - t)
                        squares.turn(f, square, I64(64), 16, y, b.mul(item.out, I64(4)), there)

        f.loop(b.udiv(b.sub(item.end, item.first), I64(32)), rows)
        _amx(f, "tilerelease")


def _amx(f: Function, name: str, *args: Value) -> None:
    full, module = f"llvm.x86.{name}", f.function.module
    if full not in module.globals:
        ir.Function(module, ir.FunctionType(VOID, [a.type for a in args]), full)
    f.b.call(module.globals[full], args)
