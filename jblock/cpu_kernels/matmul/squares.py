"""Squares of 16 vectors of 16. Each function is emitted once in a module: LLVM takes long over shuffles."""

from collections.abc import Callable, Sequence

from llvmlite import ir

from jblock.cpu_kernels.emit import F32, I32, I64, Function, Value

_LINE = ir.VectorType(F32, 16)


def turn(
    f: Function,
    source: Value,
    source_stride: Value,
    source_lines: int,
    target: Value,
    target_stride: Value,
    target_lines: int,
) -> None:
    """target[j, i] = source[i, j]: lines of 16 values of 4 bytes, strides in bytes; those that are not there
    are 0, or are not written."""
    f.call(
        _turn(f.function.module),
        *(source, source_stride, I64(source_lines), target, target_stride, I64(target_lines)),
    )


def _turn(module: ir.Module) -> ir.Function:
    def emit(f: Function) -> None:
        source, source_stride, source_lines, target, target_stride, target_lines = f.args
        spare = f.scratch(64)
        b = f.b

        def place(base: Value, stride: Value, i: int, count: Value) -> Value:
            return b.select(
                b.icmp_signed("<", I64(i), count), f.at(base, b.mul(I64(i), stride)), spare
            )

        f.put(ir.Constant(_LINE, [F32(0)] * 16), spare, 0)
        lines = [f.load(place(source, source_stride, i, source_lines), 0, 16) for i in range(16)]
        for i, line in enumerate(_transposed(f, lines)):
            f.put(line, place(target, target_stride, i, target_lines), 0)

    return _once(module, "squares.turn", "pllpll", emit)


def _once(module: ir.Module, name: str, args: str, emit: Callable[[Function], None]) -> ir.Function:
    if name not in module.globals:
        f = Function(module, name, args)
        emit(f)
        f.end()
    return module.globals[name]


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
