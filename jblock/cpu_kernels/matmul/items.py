"""How a product of one x by several weights is cut into items, which XLA's threads share.

An item is a run of output columns of one of the weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from llvmlite import ir

from jblock.cpu_kernels import ffi, threads
from jblock.cpu_kernels.emit import I64, PTR, Function, Value

UNIT = 32
"""`out` and `in` of weights are multiples of it, and so are the columns of an item."""

_ITEM_BYTES = 256 * 1024  # Weights of an item.
_HELPER_BYTES = 200_000  # Weights that make up for waking a thread.
_X, _WIDTH, _WEIGHTS, _RESULTS, _COUNT, _COLUMNS, _BYTES = range(0, 56, 8)


@dataclasses.dataclass(frozen=True)
class Item:
    """Values of one item.

    Attributes:
      x: as the kernel laid it.
      weight, y: the weight [out, in] and the result [T, out].
      width, out: sizes of the weight.
      first, end: output columns.
    """

    x: Value
    weight: Value
    y: Value
    width: Value
    out: Value
    first: Value
    end: Value


class Kernel(Protocol):
    """Code for one T and dtype.

    Attributes:
      weight_bytes: of an element of the weights.
    """

    weight_bytes: int

    def lay(self, f: Function, x: Value, width: Value) -> Value:
        """Copies x (float32 [T, in]) to where and how the items want it."""

    def compute(self, f: Function, item: Item) -> None:
        """An item, UNIT of its columns at a time."""


def run(
    f: Function, kernel: Kernel, args: ffi.Buffers, results: ffi.Buffers, pool: ffi.Pool
) -> None:
    """The body of a handler of (x, weight, ...) -> (y, ...)."""
    b = f.b
    width = f.int64(args.get(f, 1).dims, 1)
    row_bytes = b.mul(width, I64(kernel.weight_bytes))
    blocks = f.larger(b.udiv(I64(_ITEM_BYTES), b.mul(row_bytes, I64(UNIT))), I64(1))
    columns = b.mul(blocks, I64(UNIT))

    def add(n: Value, items: Value, total: Value) -> list[Value]:
        out = f.int64(args.get(f, b.add(n, I64(1))).dims, 0)
        return [b.add(items, _items(f, out, columns)), b.add(total, out)]

    items, total = f.loop(results.count, add, [I64(0), I64(0)])
    shared = f.scratch(_BYTES)
    f.store(kernel.lay(f, args.get(f, 0).data, width), shared, _X)
    f.store(width, shared, _WIDTH)
    f.store(args.array, shared, _WEIGHTS)
    f.store(results.array, shared, _RESULTS)
    f.store(results.count, shared, _COUNT)
    f.store(columns, shared, _COLUMNS)
    others = b.sub(threads.num_threads(f, pool), I64(1))
    helpers = f.smaller(others, b.udiv(b.mul(total, row_bytes), I64(_HELPER_BYTES)))
    threads.parallel_for(f, pool, items, helpers, _item(f.function.module, kernel.compute), shared)


def _items(f: Function, out: Value, columns: Value) -> Value:
    b = f.b
    return b.udiv(b.sub(b.add(out, columns), I64(1)), columns)


def _item(module: ir.Module, compute: Callable[[Function, Item], None]) -> ir.Function:
    """(shared, i) -> nothing: item i of a call."""
    f = Function(module, "item", "pl")
    b, (shared, i) = f.b, f.args
    weights, results = f.pointer(shared, _WEIGHTS), f.pointer(shared, _RESULTS)
    columns = f.int64(shared, _COLUMNS // 8)

    def skip(n: Value, which: Value, i: Value) -> list[Value]:
        """On to the next weight, where item i is not of this one."""
        items = _items(f, f.int64(ffi.buffer_at(f, weights, b.add(n, I64(1))).dims, 0), columns)
        past = b.and_(b.icmp_signed("==", which, n), b.icmp_signed(">=", i, items))
        return [b.add(which, b.zext(past, I64)), b.sub(i, b.select(past, items, I64(0)))]

    which, i = f.loop(f.int64(shared, _COUNT // 8), skip, [I64(0), i])
    weight = ffi.buffer_at(f, weights, b.add(which, I64(1)))
    out = f.int64(weight.dims, 0)
    first = b.mul(i, columns)
    compute(
        f,
        Item(
            x=b.load(f.at(shared, _X), typ=PTR),
            weight=weight.data,
            y=ffi.buffer_at(f, results, which).data,
            width=f.int64(shared, _WIDTH // 8),
            out=out,
            first=first,
            end=f.smaller(b.add(first, columns), out),
        ),
    )
    f.end()
    return f.function
