"""`y [T, out] = x [T, in] @ weight [out, in].T` for few rows, of one x and several weights: what is emitted.

Weights are read once, where they lie: with few rows that is the time it takes.
"""

from collections.abc import Sequence

from llvmlite import ir

from jblock.cpu_kernels import ffi, targets
from jblock.cpu_kernels.matmul import items
from jblock.cpu_kernels.matmul.quads import MOST_ROWS as QUADS_ROWS
from jblock.cpu_kernels.matmul.quads import Quads
from jblock.cpu_kernels.matmul.tiles import Tiles

MOST_ROWS = {"bfloat16": 64, "float32": QUADS_ROWS}
"""Of x, by the dtype of the weights: beyond, XLA's is as fast, or nearly."""


def runs_here(dtype: str) -> bool:
    """Whether this process may use the instructions that products by weights of a dtype take."""
    return targets.has_amx() if dtype == "bfloat16" else targets.has_avx512()


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name`, whose fields are the dtype of the weights and T. Its arguments are x (float32
    [T, in]) and weights ([out, in]); its results are as many y (float32 [T, out]).

    Raises:
      RuntimeError: this process may not use the instructions it takes.
    """
    dtype, count = fields[0], int(fields[1])
    if not runs_here(dtype):
        raise RuntimeError(
            f"cannot multiply by {dtype} weights in this process: the CPU has no "
            f"{'AMX' if dtype == 'bfloat16' else 'AVX-512'}"
        )
    kernel = (Tiles if dtype == "bfloat16" else Quads)(count)

    def body(f, args: ffi.Buffers, results: ffi.Buffers, pool: ffi.Pool) -> None:
        items.run(f, kernel, args, results, pool)

    ffi.open_handler(module, name, body)
