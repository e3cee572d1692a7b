"""`y [T, out] = x [T, in] @ weight [out, in].T` for few rows by AMX's bfloat16 tiles: what is emitted.

With few rows the time is that of reading the weights, so they are read once, where they lie: tiles of 16
of their rows by 32 of `in`. x is rounded to bfloat16 and laid in pairs of `in` first, as the other side
of a tile product wants it. A call's items are runs of output columns, shared between threads. An output
is one sum in the same order whatever T is, so a row has the same bits in every batch.
"""

from collections.abc import Sequence

from llvmlite import ir

from jblock.pallas_kernels.native import ffi, targets, threads
from jblock.pallas_kernels.native.emit import I8, I16, I32, I64, VOID, Function, Value

MOST_ROWS = 64
"""Of x: beyond, XLA's is as fast."""
UNIT = 32
"""`out` and `in` are multiples of it."""

_ITEM_BYTES = 256 * 1024  # Weights of an item.
_HELPER_BYTES = 200_000  # Weights that make up for waking a thread.
_SHARED = ("x", "weight", "y", "in", "out", "rows_of_item")


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name`, of which the one field is T. Its arguments are x (float32 [T, in]) and the
    weight (bfloat16 [out, in]); its result is y (float32 [T, out]).

    Raises:
      RuntimeError: this process may not use AMX.
    """
    if not targets.has_amx():
        raise RuntimeError("AMX tiles are not to be had in this process")
    kernel = _Tiles(module, int(fields[0]))

    def body(f: Function, args: Sequence[ffi.Buffer], results: Sequence[ffi.Buffer], pool) -> None:
        b = f.b
        x, weight = args
        out, width = f.int64(weight.dims, 0), f.int64(weight.dims, 1)
        source = kernel.begin(f, x.data, width)
        shared = f.scratch(8 * len(_SHARED))
        row_bytes = b.mul(width, I64(2))
        blocks = f.larger(b.udiv(I64(_ITEM_BYTES), b.mul(row_bytes, I64(UNIT))), I64(1))
        rows_of_item = b.mul(blocks, I64(UNIT))
        values = {
            "x": source, "weight": weight.data, "y": results[0].data,
            "in": width, "out": out, "rows_of_item": rows_of_item,
        }  # fmt: skip
        for at, slot in enumerate(_SHARED):
            f.store(values[slot], shared, 8 * at)
        items = b.udiv(b.add(out, b.sub(rows_of_item, I64(1))), rows_of_item)
        others = b.sub(threads.num_threads(f, pool), I64(1))
        helpers = f.smaller(others, b.udiv(b.mul(out, row_bytes), I64(_HELPER_BYTES)))
        threads.parallel_for(f, pool, items, helpers, kernel.item, shared)

    ffi.handler(module, name, 2, 1, body)


def _shared(f: Function) -> dict[str, Value]:
    shared = f.args[0]
    return {
        name: f.pointer(shared, 8 * at) if at < 3 else f.int64(shared, at)
        for at, name in enumerate(_SHARED)
    }


class _Tiles:
    """Products by AMX tiles: 16 weight rows by 16 rows of x, 32 of `in` at a time.

    Attributes:
      item: (shared, i) -> nothing: item i of a call.
    """

    def __init__(self, module: ir.Module, count: int):
        self.module, self.count = module, count
        self.columns = -(-count // 16)  # tiles of rows of x
        self.item = self._item()

    def begin(self, f: Function, x: Value, width: Value) -> Value:
        """x in bfloat16, as pairs of `in`: [tile of rows, in / 2, 16 rows, 2]; rows that are not there are 0.

        A tile of 16 rows by 16 pairs is transposed at a time.
        """
        b = f.b
        total = b.mul(b.mul(width, I64(32)), I64(self.columns))
        place = f.scratch(total)
        pairs = ir.VectorType(I32, 16)

        def lay(k: Value) -> None:
            k = b.mul(k, I64(32))
            for column in range(self.columns):
                rows = []
                for t in range(16):
                    row = 16 * column + t
                    if row >= self.count:
                        rows.append(ir.Constant(pairs, [0] * 16))
                        continue
                    start = b.add(b.mul(I64(row), width), k)
                    halves = [
                        f.narrow(f.load(x, b.add(start, I64(16 * h)), 16), "bfloat16")
                        for h in range(2)
                    ]
                    both = b.shuffle_vector(
                        halves[0], halves[1], ir.Constant(ir.VectorType(I32, 32), list(range(32)))
                    )
                    rows.append(b.bitcast(both, pairs))
                for p, pair in enumerate(_transposed(f, rows)):
                    # Pair (k / 2 + p) of a column: 16 rows of 4 bytes.
                    at = b.mul(b.add(b.udiv(k, I64(2)), I64(p)), I64(64))
                    at = b.add(at, b.mul(width, I64(32 * column)))
                    b.store(pair, f.at(place, at), align=64)

        f.loop(b.udiv(width, I64(32)), lay)
        return place

    def _item(self) -> ir.Function:
        f = Function(self.module, "item", "pl")
        b, i = f.b, f.args[1]
        got = _shared(f)
        width = got["in"]
        config = f.scratch(64)
        for at in range(0, 64, 8):
            f.store(I64(0), config, at)
        f.store(I8(1), config, 0)
        for tile in range(8):
            f.store(I16(64), config, 16 + 2 * tile)
            f.store(I8(16), config, 48 + tile)
        self._amx(f, "ldtilecfg", config)
        first = b.mul(i, got["rows_of_item"])
        end = f.smaller(b.add(first, got["rows_of_item"]), got["out"])
        square = f.scratch(1024)
        row_bytes = b.mul(width, I64(2))
        # Two tiles of weights by one or two of x: sums in 0 .. 3, weights in 4 and 5, x in 6 and 7.
        groups = [(c, min(2, self.columns - c)) for c in range(0, self.columns, 2)]

        def rows(n: Value) -> None:
            o = b.add(first, b.mul(n, I64(32)))
            weights = f.at(got["weight"], b.mul(o, width), 2)
            for column, wide in groups:
                for tile in range(2 * wide):
                    self._amx(f, "tilezero", I8(tile))

                def along(k: Value, column=column, wide=wide) -> None:
                    w = f.at(weights, b.mul(k, I64(64)))
                    for r in range(2):
                        tile = f.at(w, b.mul(I64(16 * r), row_bytes))
                        self._amx(f, "tileloadd64", I8(4 + r), tile, row_bytes)
                    for c in range(wide):
                        at = b.add(b.mul(width, I64(32 * (column + c))), b.mul(k, I64(1024)))
                        self._amx(f, "tileloadd64", I8(6 + c), f.at(got["x"], at), I64(64))
                        for r in range(2):
                            self._amx(f, "tdpbf16ps", I8(2 * c + r), I8(4 + r), I8(6 + c))

                f.loop(b.udiv(width, I64(32)), along)
                for c in range(wide):
                    for r in range(2):
                        self._amx(f, "tilestored64", I8(2 * c + r), square, I64(64))
                        lines = [f.load(square, 16 * m, 16) for m in range(16)]
                        for t, line in enumerate(_transposed(f, lines)):
                            row = 16 * (column + c) + t
                            if row < self.count:
                                at = b.add(b.mul(I64(row), got["out"]), b.add(o, I64(16 * r)))
                                f.put(line, got["y"], at)

        f.loop(b.udiv(b.sub(end, first), I64(32)), rows)
        self._amx(f, "tilerelease")
        f.end()
        return f.function

    def _amx(self, f: Function, name: str, *args: Value) -> None:
        full = f"llvm.x86.{name}"
        if full not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(VOID, [a.type for a in args]), full)
        f.b.call(self.module.globals[full], args)


def _transposed(f: Function, rows: Sequence[Value]) -> list[Value]:
    """16 vectors of 16, the other way round."""
    out = list(rows)
    for step in (8, 4, 2, 1):
        low = [i if not i & step else 16 + i - step for i in range(16)]
        high = [i + step if not i & step else 16 + i for i in range(16)]
        masks = [ir.Constant(ir.VectorType(I32, 16), m) for m in (low, high)]
        for i in range(16):
            if not i & step:
                x, y = out[i], out[i + step]
                out[i], out[i + step] = (f.b.shuffle_vector(x, y, mask) for mask in masks)
    return out
