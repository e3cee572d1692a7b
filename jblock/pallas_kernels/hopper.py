"""The few operations of Mosaic GPU that say how registers are laid out, kept apart from the kernels.

They are what the Mosaic GPU interpreter cannot run (it knows neither register layouts nor a matmul with
an operand in registers or a transposed one), so the tests put plain array versions in their place;
everything else of a kernel, copies, barriers and warp specialization, they interpret as it stands.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any
"""Memory or barriers that a kernel names, or a part of them; the type that jax has for it is private."""

SHARED_MEMORY = 227 * 1024 - 2048
"""Bytes of shared memory a block may use on sm_90, less a little for barriers."""

MULTIPROCESSORS = 132

COPY_ARRIVALS = 2 * 32
"""How often threads arrive at a barrier for a copy that one warp makes: each for three others, then for
itself and for the copy's bytes."""

# jax 0.10 wants an index; later ones take none.
_NO_INDEX: tuple[Any, ...] = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def bits_of(dtype: Any) -> int:
    """Bits of a value in memory, where two of int4 share a byte."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else jnp.dtype(dtype).itemsize * 8


def swizzle_columns(columns: int, dtype: Any) -> int:
    """Columns of one tile of `swizzled` memory: as many as the widest swizzle that divides a row."""
    bits = bits_of(dtype)
    return int(plgpu.find_swizzle(columns * bits)) * 8 // bits


def swizzled(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for a wgmma operand: [..., rows, columns], tiled and swizzled as TMA writes it; columns:
    of a tile, which is what can be read at a time; None: the most there can be."""
    columns = columns or swizzle_columns(shape[-1], dtype)
    swizzle = columns * bits_of(dtype) // 8
    made: Any = plgpu  # their classes pass for abstract in jax 0.12
    transforms = made.TilingTransform((8, columns)), made.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def by_one_warp(act: Callable[[], None]) -> None:
    """act(), copies and scalars alone, by one warp of the warpgroup: a copy takes COPY_ARRIVALS arrivals at
    its barrier so, which count as the warpgroup's 128 all the same. The warpgroup goes on together."""

    @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
    def _warps() -> None:
        pl.when(jax.lax.axis_index("warp") == 0)(act)


def whole_tiles(x: jax.Array) -> jax.Array:
    """x [rows, ...] as copies into `swizzled` memory can read it, with rows added at the end.

    TMA reads device memory in tiles of 8 rows, so of more than 8 there have to be whole tiles. A copy has to
    begin at a tile: one that begins inside brings the tile's last rows, and zeros for those of the next.
    The interpreter knows nothing of this.
    """
    missing = -x.shape[0] % 8 if x.shape[0] > 8 else 0
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def matmul(
    a: Any, b: Any, *, transpose_b: bool = False, then: Callable[[], None] | None = None
) -> jax.Array:
    """a @ b in float32, accumulated in registers.

    Args:
      a: [64, k], shared memory or registers in the accumulator's layout.
      b: [k, n] in shared memory, or [n, k] with transpose_b.
      then: run after the matmul is issued, before it is awaited.
    """
    b = plgpu.transpose_ref(b, (1, 0)) if transpose_b else b

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        if then is not None:
            then()
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_product(
    total: jax.Array, a: jax.Array, b: Any, *, then: Callable[[], None] | None = None
) -> jax.Array:
    """total + a @ b, summed where total lies: a product of its own would take as many registers again.

    Args:
      total: float32 [64, n] in the accumulator's layout.
      a: [64, k] in registers, in that layout.
      b: [k, n] in shared memory.
      then: run after the matmul is issued, before it is awaited.
    """

    def run(acc: Any) -> None:
        plgpu.wgmma(acc, a, b)
        if then is not None:
            then()

    return pl.run_state(run)(plgpu.ACC.init(total))


def sum_of_products(
    shape: tuple[int, int],
    steps: Any,
    arrived: Callable[[Any], None],
    operands: Callable[[Any], tuple[Ref, Ref]],
    read: Callable[[Any], None],
) -> jax.Array:
    """The sum of a_i @ b_i.T over i < steps in float32, kept in the accumulator all the while.

    Args:
      shape: of the sum, [64, n].
      steps: how many products; none gives zeros.
      arrived: waits until the operands of product i are there.
      operands: i -> a_i [64, k] and b_i [n, k] in shared memory.
      read: called with i when the operands of product i were read, while the next one runs: that one
        product is outstanding says that the one before it is done, not that this one is.
    """

    def run(acc: Any) -> jax.Array:
        @pl.loop(0, steps)
        def _step(i: Any) -> None:
            arrived(i)
            a, b = operands(i)
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: read(i - 1))

        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: read(steps - 1))
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def accumulator(shape: tuple[int, int], value: float) -> jax.Array:
    """A constant in an accumulator's layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def per_row(rows: int, value: float) -> jax.Array:
    """A constant vector laid out as one value for each of an accumulator's rows."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    """int32 indices in an accumulator's layout."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def row_indices(rows: int) -> jax.Array:
    """int32 [rows], each row's index, laid out as of `per_row`."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)


def column_indices(columns: int) -> jax.Array:
    """int32 [columns], each column's index, laid out as of `load_columns`."""
    layout = plgpu.Layout.WGMMA.reduce(0)
    return plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=layout)


def load(ref: Any) -> jax.Array:
    """A [64 * i, 8 * j] array of 16 or 32 bit values from shared memory, in an accumulator's layout."""
    return plgpu.load(ref, *_NO_INDEX, layout=plgpu.Layout.WGMMA, optimized=False)


def load_8_bits(ref: Any) -> jax.Array:
    """A [64, 8 * j] array of int8 or float8_e4m3fn from shared memory as bfloat16; layout as of `load`."""
    values = load(ref)
    if ref.dtype != jnp.int8:
        values = values.astype(jnp.float32)
    return values.astype(jnp.bfloat16)


def load_rows(ref: Any) -> jax.Array:
    """A [64] vector of float32 from shared or device memory, one value for each of an accumulator's rows."""
    return plgpu.load(ref, *_NO_INDEX, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """A [8 * j] vector of float32 from shared memory, one value for each of an accumulator's columns."""
    return plgpu.load(ref, *_NO_INDEX, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def load_widened(ref: Any) -> jax.Array:
    """A [64, k] array of int8 or int4 from shared memory as bfloat16, laid out as a matmul's left operand."""
    if ref.dtype == jnp.int4:
        values = plgpu.load(ref, *_NO_INDEX, layout=plgpu.Layout.WGMMA_UPCAST_4X, optimized=False)
        return plgpu.layout_cast(values, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
    values = plgpu.load(ref, *_NO_INDEX, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    return plgpu.layout_cast(values.astype(jnp.bfloat16), plgpu.Layout.WGMMA)


def store_transposed(ref: Any, value: jax.Array) -> None:
    """Stores an accumulator [64, n] as [n, 64] into `swizzled` shared memory."""
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.transpose_ref(ref, (1, 0))[...] = value
