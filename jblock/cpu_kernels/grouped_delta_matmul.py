"""Emits the grouped delta matmul for the CPU; `pallas_kernels/grouped_delta_matmul/cpu.py` calls it.

A call's items are (group, run of rows). Pieces are read where they lie, once for three rows, and not at
all for a group without any. The product of a row and a rank is summed in one order, however many rows
are taken together.
"""

import math
from collections.abc import Sequence

from llvmlite import ir

from jblock.cpu_kernels import ffi, targets, threads
from jblock.cpu_kernels.emit import I64, Function, Value

_RUN = 32  # Rows of an item, at most.
_HELPER_BYTES = 300_000  # Read for one more thread, see paged_attention/kernel.py.
_SHARED = ("y", "x", "a", "b", "pieces", "starts", "turns", "runs", "table")


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name` of the fields rank, in, out."""
    rank, width, out_width = map(int, fields)
    rows_at_once = max(1, targets.accumulators() // rank)
    steps = {n: _rows(module, f"rows{n}", n, rank, width, out_width) for n in {1, rows_at_once}}
    item = _item(module, steps, rows_at_once, width, out_width)

    def body(f: Function, args: Sequence[ffi.Buffer], results: Sequence[ffi.Buffer], pool) -> None:
        b = f.b
        y, x, a, second, pieces, sizes = args
        groups, turns = f.int64(pieces.dims, 0), f.int64(pieces.dims, 1)
        rows = f.int64(y.dims, 0)
        runs = f.up(rows, _RUN)
        starts = f.scratch(b.mul(b.add(groups, I64(1)), I64(8)))
        f.store(I64(0), starts)

        def add(g: Value, begin: Value, work: Value) -> list[Value]:
            size = f.larger(f.int32(sizes.data, g), I64(0))
            end = f.smaller(b.add(begin, size), rows)
            f.store(end, starts, b.mul(b.add(g, I64(1)), I64(8)))
            own = f.loop(
                turns,
                lambda k, n: [b.add(n, b.zext(b.icmp_signed(">", piece(g, k), I64(0)), I64))],
                [I64(0)],
            )[0]
            # A row more costs about a fourth of what reading the piece does.
            return [end, b.add(work, b.mul(own, b.add(b.sub(end, begin), I64(3))))]

        piece = lambda g, k: f.int32(pieces.data, b.add(b.mul(g, turns), k))
        _, work = f.loop(groups, add, [I64(0), I64(0)])
        work = b.mul(work, I64(rank * (width + out_width)))
        helpers = f.smaller(
            b.sub(threads.num_threads(f, pool), I64(1)), b.sdiv(work, I64(_HELPER_BYTES))
        )
        values = (
            *(z.data for z in (results[0], x, a, second, pieces)),
            *(starts, turns, runs, f.int64(a.dims, 0)),
        )
        shared = f.scratch(8 * len(_SHARED))
        for at, value in enumerate(values):
            f.store(value, shared, 8 * at)
        threads.parallel_for(f, pool, b.mul(groups, runs), helpers, item, shared)

    ffi.handler(module, name, 6, 1, body)


def _item(
    module: ir.Module, steps: dict[int, ir.Function], most: int, width: int, out_width: int
) -> ir.Function:
    """(shared, i): some rows of one group, with all its pieces."""
    f = Function(module, "item", "pl")
    b, (shared, i) = f.b, f.args
    got = {
        n: f.int64(shared, at) if n in ("turns", "runs", "table") else f.pointer(shared, 8 * at)
        for at, n in enumerate(_SHARED)
    }
    g = b.sdiv(i, got["runs"])
    row = b.add(f.int64(got["starts"], g), b.mul(b.srem(i, got["runs"]), I64(_RUN)))
    count = f.smaller(b.sub(f.int64(got["starts"], b.add(g, I64(1))), row), I64(_RUN))

    def turn(k: Value) -> None:
        piece = f.int32(got["pieces"], b.add(b.mul(g, got["turns"]), k))
        there = b.and_(b.icmp_signed(">", piece, I64(0)), b.icmp_signed("<", piece, got["table"]))

        def rows(n: int, first: Value) -> None:
            at = b.add(row, first)
            place = [
                f.at(got[z], b.mul(at, I64(w)), 4) for z, w in (("x", width), ("y", out_width))
            ]
            f.call(steps[n], got["a"], got["b"], piece, *place)

        def add() -> None:
            whole = b.sdiv(count, I64(most))
            f.loop(whole, lambda j: rows(most, b.mul(j, I64(most))))
            if most > 1:
                f.loop(count, lambda j: rows(1, j), first=b.mul(whole, I64(most)))

        f.when(there, add)

    f.loop(got["turns"], turn)
    f.end()
    return f.function


def _rows(
    module: ir.Module, name: str, rows: int, rank: int, width: int, out_width: int
) -> ir.Function:
    """(a, b, piece, x, y): adds one piece's part to `rows` rows that follow each other."""
    f = Function(module, name, "pplpp")
    build, (a, b, piece, x, y) = f.b, f.args
    vector = math.gcd(width, targets.vector_width())
    a = f.at(a, build.mul(piece, I64(rank * width)), 4)
    b = f.at(b, build.mul(piece, I64(rank * out_width)), 4)

    def along(i: Value, *sums: Value) -> list[Value]:
        at = build.mul(i, I64(vector))
        xs = [f.load(x, build.add(at, I64(r * width)), vector) for r in range(rows)]
        out = list(sums)
        for k in range(rank):
            one = f.load(a, build.add(at, I64(k * width)), vector)
            for r in range(rows):
                out[r * rank + k] = f.fma(one, xs[r], out[r * rank + k])
        return out

    sums = f.loop(width // vector, along, [f.splat(0.0, vector)] * (rows * rank))
    vector = math.gcd(out_width, targets.vector_width())
    inner = [f.splat(f.fold(z, build.fadd), vector) for z in sums]

    def spread(i: Value) -> None:
        at = build.mul(i, I64(vector))
        ones = [f.load(b, build.add(at, I64(k * out_width)), vector) for k in range(rank)]
        for r in range(rows):
            place = build.add(at, I64(r * out_width))
            # In two parts, which do not wait for each other.
            parts = [f.load(y, place, vector), build.fmul(ones[-1], inner[r * rank + rank - 1])]
            for k in range(rank - 1):
                parts[k % 2] = f.fma(ones[k], inner[r * rank + k], parts[k % 2])
            f.put(build.fadd(*parts), y, place)

    f.loop(out_width // vector, spread)
    f.end()
    return f.function
