"""Grouped block matmul on TPU, in Pallas Mosaic.

Work is cut into items, a block of rows by a variant that has rows in it, in the order of the rows. The
outer loop is over columns of the result, the inner one over items, each over all inputs: so a block of
columns of a variant's weight is read once, whatever items its rows make, and a variant without rows is
never read. The next one comes in while the present one is multiplied. Where an item has not all rows of
its block, a window of it is multiplied, once. Of that only the rows before the item's first are masked: those
behind its last one the next item of the block overwrites.

The idea of items over sorted rows is megablox's (jax.experimental.pallas.ops.tpu.megablox, after arXiv
2211.15841); that kernel wants all weights stacked in one array and reads a weight again for each block
of rows, unless all inputs are one block of it too. Weights of their own arrays and this order are ours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.groups import choose, even_windows, for_window, items
from jblock.pallas_kernels.refs import refs
from jblock.pallas_kernels.tuning import Tuning, matrix_unit

LANES = 128
PART = 16
"""Rows that are multiplied at least: a register tile of bfloat16."""

_INPUTS = 512
"""Of a product: what the matrix units of a core, 4 of 128 or 2 of 256, take together."""
_SUMMED = 32
"""Rows of a product that are added to those before at a time."""

_VMEM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on.

    Attributes:
      rows: of x, rounded up to a power of two.
      variants: how many.
      width: inputs.
      out: columns of the result.
      dtype: name of the weights'.
    """

    rows: int
    variants: int
    width: int
    out: int
    dtype: str

    @property
    def key(self) -> str:
        """How a tuned file names the shape."""
        return f"{self.rows}x{self.width}x{self.out} of {self.variants} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel cuts its work: rows of an item at most, and columns of the result at a time. Columns
    are made to divide the result's."""

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < PART or self.rows % PART or self.columns < 1 or self.columns % LANES:
            raise ValueError(f"{self}: give rows a multiple of {PART}, columns one of {LANES}")


def heuristic(shape: Shape) -> Blocks:
    """Blocks of 256 rows or 8 MB of them, so that those of decoding are brought once for all columns, and
    of 4 MB of a weight: far over what hides a copy's latency, and twice both fits vector memory."""
    item = 4 if shape.dtype == "float32" else 2
    rows = min(256, 2**23 // (shape.width * item), -(-shape.rows // PART) * PART)
    columns = min(1024, 2**22 // (shape.width * item))
    return Blocks(rows=max(PART, rows // PART * PART), columns=max(LANES, columns // LANES * LANES))


TUNING = Tuning("grouped_block_matmul", Blocks, heuristic)


@refs
class _Scalars:
    """Of N items, in scalar memory: int32 [N] each."""

    block: Any  # of rows
    group: Any  # its variant; behind the last one: rows of none
    first: Any  # row of the block
    last: Any  # behind its last row
    begins: Any  # 1: it is its variant's first item
    following: Any  # see `_following`


@refs
class _Scratch:
    """The kernel's buffers."""

    weights: Any  # [2, columns, in], of the present variant and of the next one
    sems: Any  # DMA [2]
    begun: Any  # int32 [1] in SMEM: variants until now
    total: Any  # float32 [rows, unit], see `_multiply`
    zeros: Any  # int32 [1 + columns / unit] in SMEM, likewise


def grouped_block_matmul(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    device_kind: str | None = None,
    blocks: Blocks | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """See `api.grouped_block_matmul`.

    Args beyond it:
      blocks: how to cut the work; None: as tuned for the device.
      interpret: as of pallas_call.
    """
    rows, (out, width), dtype = x.shape[0], weights[0].shape, weights[0].dtype
    if blocks is None:
        shape = Shape(
            rows=1 << (rows - 1).bit_length(),
            variants=len(weights),
            width=width,
            out=out,
            dtype=dtype.name,
        )
        blocks = TUNING.blocks_for(shape, device_kind)
    size = blocks.rows
    padded = -(-rows // PART) * PART
    size = min(size, padded)
    columns = dividing(out, blocks.columns)
    unit = dividing(columns, matrix_unit(device_kind))

    # What is behind the last variant's rows is a variant without a weight, whose result is zeros.
    rest = rows - jnp.sum(group_sizes, dtype=jnp.int32)
    todo = items(jnp.concatenate([group_sizes.astype(jnp.int32), rest[None]]), rows, size)
    weighs = (todo.group < len(weights)) & (jnp.arange(todo.group.size) < todo.count)
    begins = todo.changes(todo.group) * weighs
    following = _following(begins, todo.group)
    scratch: Any = _Scratch(
        weights=pltpu.VMEM((2, columns, width), dtype),
        sems=pltpu.SemaphoreType.DMA((2,)),
        begun=pltpu.SMEM((1,), jnp.int32),
        total=pltpu.VMEM((size, unit), jnp.float32),
        zeros=pltpu.SMEM((1 + columns // unit,), jnp.int32),
    )
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(out // columns, todo.count),
            in_specs=[
                pl.BlockSpec((size, width), lambda n, i, scalars: (scalars.block[i], 0)),
                (pl.BlockSpec(memory_space=pl.ANY),) * len(weights),
            ],
            out_specs=pl.BlockSpec((size, columns), lambda n, i, scalars: (scalars.block[i], n)),
            scratch_shapes=[scratch],
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_block_matmul",
    )(
        _Scalars(
            block=todo.block,
            group=todo.group,
            first=todo.first,
            last=todo.last,
            begins=begins,
            following=following,
        ),
        jnp.pad(x.astype(dtype), ((0, padded - rows), (0, 0))),
        tuple(weights),
    )[:rows]


def _following(begins: jax.Array, group: jax.Array) -> jax.Array:
    """int32 [N], for an item that begins a variant: the next variant with rows; -1: there is none."""
    item = jnp.arange(begins.size)
    # The first beginning behind each item.
    later = jnp.where((begins > 0)[None] & (item[None] > item[:, None]), item[None], begins.size)
    nearest = later.min(axis=1)
    found = group[jnp.minimum(nearest, begins.size - 1)]
    return jnp.where(nearest < begins.size, found, -1).astype(jnp.int32)


def dividing(out: int, most: int) -> int:
    """The most columns up to `most` that divide `out`, in whole registers; all where there are none."""
    if out % LANES:
        return out
    registers = out // LANES
    return LANES * max(n for n in range(1, most // LANES + 1) if registers % n == 0)


def _kernel(items: _Scalars, x: Any, weights: tuple[Any, ...], out: Any, s: _Scratch) -> None:
    """One item by some columns: x [rows, in]; weights [out, in] each, in HBM; out [rows, columns]."""
    n, i = pl.program_id(0), pl.program_id(1)
    (size, columns), variants = out.shape, len(weights)
    group, following, first = items.group[i], items.following[i], items.first[i]

    def copy(weight: Any, n: Any, slot: Any) -> Any:
        part = weight.at[pl.ds(n * columns, columns)]
        return pltpu.make_async_copy(part, s.weights.at[slot], s.sems.at[slot])

    def bring(variant: Any, n: Any, slot: Any) -> None:
        choose(variant, variants, lambda v: copy(weights[v], n, slot).start())

    @pl.when((n == 0) & (i == 0))
    def _first() -> None:
        s.begun[0] = 0
        for z in range(s.zeros.shape[0]):
            s.zeros[z] = 0

    @pl.when(items.begins[i] == 1)
    def _begin() -> None:
        nth = s.begun[0]
        slot = lax.rem(nth, 2)
        s.begun[0] = nth + 1
        pl.when(nth == 0)(lambda: bring(group, n, slot))
        pl.when(following >= 0)(lambda: bring(following, n, 1 - slot))
        # Behind the last variant comes the first one, which item 0 has, with the next columns.
        around = (following < 0) & (n + 1 < pl.num_programs(0))
        pl.when(around)(lambda: bring(items.group[0], n + 1, 1 - slot))
        copy(weights[0], n, slot).wait()

    slot = lax.rem(s.begun[0] + 1, 2)

    def mine(begin: Any, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, shape, 0) >= first - begin

    def multiply(begin: Any, rows: int) -> None:
        _multiply(x, s.weights.at[slot], out, s, begin, rows, mine)

    @pl.when(group < variants)
    def _rows_of_a_variant() -> None:
        for_window(first, items.last[i], even_windows(size, PART), PART, multiply)

    @pl.when(group == variants)
    def _rows_of_none() -> None:
        pltpu.store(out, jnp.zeros(out.shape, jnp.float32), mask=mine(0, out.shape))


def _multiply(
    x: Any,
    weight: Any,
    out: Any,
    s: _Scratch,
    begin: Any,
    rows: int,
    mine: Callable[[Any, tuple[int, ...]], jax.Array],
) -> None:
    """Rows begin .. begin + rows - 1 of x [size, width] by a weight [columns, width]; of the product goes
    into out [size, columns] what mine(first row, shape of a part) says.

    No register is spilled, because sums are added up in vector memory, a few rows at a time, and x is
    loaded anew for each columns. What is stored at 0 is loaded at zeros that only the program knows:
    else the compiler would keep all of it in registers."""
    (columns, width), unit, total = weight.shape, s.total.shape[1], s.total
    zero = [pl.multiple_of(s.zeros[n], PART) for n in range(1 + columns // unit)]
    for n, column in enumerate(range(0, columns, unit)):
        at = pl.ds(column, unit)
        for k in range(0, width, _INPUTS):
            inputs = pl.ds(k, min(_INPUTS, width - k))
            product = lax.dot_general(
                x[pl.ds(begin + zero[1 + n], rows), inputs],
                weight[at, inputs],
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            for r in range(0, rows, _SUMMED):
                number = min(_SUMMED, rows - r)
                part = product[r : r + number]
                if k > 0:
                    part += total[pl.ds(zero[0] + r, number)]
                if k + _INPUTS < width:
                    total[pl.ds(r, number)] = part
                    continue
                mask = mine(begin + r, part.shape)
                pltpu.store(out.at[pl.ds(begin + r, number), at], part, mask=mask)
