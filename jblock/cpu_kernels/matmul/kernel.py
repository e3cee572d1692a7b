"""`y [T, out] = x [T, in] @ weight [out, in].T` for few rows, of one x and several weights: what is emitted.

Weights are read once, where they lie: with few rows that is the time it takes.
"""

from collections.abc import Sequence

from llvmlite import ir

from jblock.cpu_kernels import ffi, targets
from jblock.cpu_kernels.matmul import items
from jblock.cpu_kernels.matmul.quads import PART_ROWS, Quads
from jblock.cpu_kernels.matmul.tiles import Tiles

_BFLOAT16_ROWS = range(1, 65)
_FLOAT32_ROWS = range(2, PART_ROWS + 1)


def rows_served(dtype: str) -> range:
    """Numbers of rows of x for which weights of a dtype are multiplied in this process; none: it may not use
    the instructions that takes. Beyond, products by XLA are as fast, or nearly; of one float32 row faster."""
    if dtype == "bfloat16" and (targets.has_amx() or targets.has_avx512_bf16()):
        return _BFLOAT16_ROWS
    if dtype == "float32" and targets.has_avx512():
        return _FLOAT32_ROWS
    return range(0)


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name`, whose fields are the dtype of the weights and T. Its arguments are x (float32
    [T, in]) and weights ([out, in]); its results are as many y (float32 [T, out]).

    Raises:
      RuntimeError: this process may not use the instructions it takes.
    """
    dtype, count = fields[0], int(fields[1])
    if not rows_served(dtype):
        raise RuntimeError(
            f"cannot multiply by {dtype} weights in this process: the CPU has no "
            f"{'AMX or AVX-512 BF16' if dtype == 'bfloat16' else 'AVX-512'}"
        )
    tiles = dtype == "bfloat16" and targets.has_amx()
    kernel = Tiles(count) if tiles else Quads(count, dtype)

    def body(f, args: ffi.Buffers, results: ffi.Buffers, pool: ffi.Pool) -> None:
        items.run(f, kernel, args, results, pool)

    ffi.open_handler(module, name, body)
