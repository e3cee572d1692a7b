"""Quantized matmul on TPU, in Pallas Mosaic: weights come from memory in their 8 or 4 bits.

A grid step has some rows of x and some columns of the result, over all inputs. It goes through the inputs
in chunks that share their scales: whole numbers go into the matrix unit, and the product takes the scale,
a row of one for each column, on its way into the sum. Groups of fewer than 128 inputs are narrower than
the matrix unit; there the scales are spread over the inputs of a chunk, by a product with a matrix of
zeros and ones, and the weights take them.

Zeros are taken off outside: their share is a product of the sums of x over each group.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.quantized_matmul import xla
from jblock.pallas_kernels.tuning import Tuning

LANES = 128
_VMEM_BYTES = 64 * 2**20
_LONGEST_CHUNK = 1024
FEW_ROWS = 64
_TOGETHER = 4  # chunks of a turn of the kernel's loop
_COLUMNS = 512  # whose sums are in registers together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on.

    Attributes:
      rows: of x, rounded up to a power of two.
      width: inputs.
      out: columns of the result.
      group: inputs of a scale.
      bits: of the weights.
    """

    rows: int
    width: int
    out: int
    group: int
    bits: int

    @property
    def key(self) -> str:
        """How a tuned file names the shape."""
        return f"{self.rows}x{self.width}x{self.out} group {self.group} int{self.bits}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel cuts its work: rows of x and columns of the result of a grid step."""

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.rows % 16 or self.columns < 1 or self.columns % LANES:
            raise ValueError(f"{self}: give rows a multiple of 16, columns one of {LANES}")


def heuristic(shape: Shape) -> Blocks:
    """At most 256 rows or 4 MB of them, which are many enough to hide widening the weights behind the
    matrix unit; columns for blocks of 2 M weights, far over what hides a copy's latency, and of 4 M for few
    rows, where a grid step's own cycles would show."""
    rows = max(16, min(256, 2**21 // shape.width // 16 * 16, -(-shape.rows // 16) * 16))
    weights = 2**22 if rows <= FEW_ROWS else 2**21
    columns = max(LANES, min(1024, weights // shape.width // LANES * LANES))
    return Blocks(rows=rows, columns=min(columns, -(-shape.out // LANES) * LANES))


TUNING = Tuning("quantized_matmul", Blocks, heuristic)


def serves(width: int, groups: int) -> bool:
    """Whether the kernel takes such weights: inputs in whole registers, and groups that divide or are
    multiples of one. Others go to the XLA backend."""
    group = width // groups
    return width % LANES == 0 and (group % LANES == 0 or (LANES % group == 0 and group >= 8))


def quantized_matmul(
    x: jax.Array,
    w_q: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    device_kind: str | None = None,
    blocks: Blocks | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """See `api.quantized_matmul`.

    Args beyond it:
      blocks: how to cut the work; None: as tuned for the device.
      interpret: as of pallas_call.
    """
    (rows, width), out = x.shape, w_q.shape[0]
    if w_q.dtype == jnp.uint8 or not serves(width, scales.shape[1]):
        return xla.at_once(x, w_q, scales, zeros)
    group = width // scales.shape[1]
    if blocks is None:
        shape = Shape(
            rows=1 << (rows - 1).bit_length(),
            width=width,
            out=out,
            group=group,
            bits=4 if w_q.dtype == jnp.int4 else 8,
        )
        blocks = TUNING.blocks_for(shape, device_kind)
    y = _call(x, w_q, scales, group, blocks, interpret)
    if zeros is None:
        return y
    sums = x.astype(jnp.float32).reshape(rows, -1, group).sum(axis=2)
    return y - jnp.dot(sums, (scales * zeros).T, precision=lax.Precision.HIGHEST)


def _call(
    x: jax.Array,
    w_q: jax.Array,
    scales: jax.Array,
    group: int,
    blocks: Blocks,
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:
    (rows, width), out = x.shape, w_q.shape[0]
    # A block is all of a dimension or a multiple of a tile; the last one may stick out.
    size = rows if rows <= blocks.rows else blocks.rows
    columns = out if out <= blocks.columns else blocks.columns
    chunk = max(group, LANES)
    while chunk > _LONGEST_CHUNK:
        chunk = _divided(chunk)
    laid = scales.T
    return pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, group=group),
        grid=(pl.cdiv(out, columns), pl.cdiv(rows, size)),
        in_specs=[
            pl.BlockSpec((size, width), lambda n, m: (m, 0)),
            pl.BlockSpec((columns, width), lambda n, m: (n, 0)),
            pl.BlockSpec((laid.shape[0], columns), lambda n, m: (0, n)),
        ],
        out_specs=pl.BlockSpec((size, columns), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows, out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(x, w_q, laid)


def _divided(chunk: int) -> int:
    """The longest shorter chunk of whole registers that divides it."""
    registers = chunk // LANES
    return LANES * max(n for n in range(1, registers) if registers % n == 0)


def chunks_together(rows: int, chunks: int) -> int:
    """Chunks of a turn of the kernel's loop for so many rows of x.

    Of few rows many, so that the weights of one are on their way into the matrix unit while another's product
    comes out. Of many rows the products of two would not fit the registers.
    """
    most = _TOGETHER if rows <= FEW_ROWS else 1
    return max(n for n in range(1, most + 1) if chunks % n == 0)


def column_bounds(columns: int) -> list[int]:
    """Where the parts begin in which columns are added up, and where the last one ends.

    They are at most _COLUMNS each, in whole registers, and as alike as they can be: a part of one register
    behind others has scales that Mosaic cannot load.
    """
    registers = pl.cdiv(columns, LANES)
    parts = pl.cdiv(registers, _COLUMNS // LANES)
    return [*(LANES * pl.cdiv(registers * i, parts) for i in range(parts)), columns]


def _kernel(x, w_q, scales, out, *, chunk: int, group: int):
    """x [rows, in], w_q [columns, in], scales [groups, columns] -> out [rows, columns]."""
    parts = max(1, LANES // group)  # groups of a chunk
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if parts > 1:
        first = lax.broadcasted_iota(jnp.int32, (parts, chunk), 0) * group
        ahead = lax.broadcasted_iota(jnp.int32, (parts, chunk), 1) - first
        spread = ((ahead >= 0) & (ahead < group)).astype(jnp.float32)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x,
            w.astype(x.dtype),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    out[...] = jnp.zeros(out.shape, jnp.float32)
    chunks = x.shape[1] // chunk
    together = chunks_together(x.shape[0], chunks)

    def scaled_product(c: jax.Array, columns: Any) -> jax.Array:
        inputs = pl.ds(pl.multiple_of(c * chunk, LANES), chunk)
        w = w_q[columns, inputs]
        if parts == 1:
            scale = scales[pl.ds(lax.div(c, max(1, group // chunk)), 1), columns]
            return product(x[:, inputs], w) * scale
        by_input = lax.dot_general(
            scales[pl.ds(c * parts, parts), columns],
            spread,
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return product(x[:, inputs], w.astype(jnp.float32) * by_input)

    bounds = column_bounds(out.shape[1])

    @pl.loop(0, chunks // together)
    def add(several):
        for begin, end in itertools.pairwise(bounds):
            columns = pl.ds(begin, end - begin)
            out[:, columns] += sum(
                scaled_product(several * together + i, columns) for i in range(together)
            )
