"""Paged attention on TPU: what is around the Mosaic kernel of `tpu_kernel.py`.

Pages are `[page, 2 (k, v), kv_head, page_size / R, R, d]` with R the rows of a register tile (8 of
float32, 16 of bfloat16, 32 of 8 bits): a page is one copy for both and all heads, a head's tokens lie as
the matrix unit wants them, and since the two last dimensions are exactly one tile, a copy may
begin and end at any tile of a page. d is the head's width rounded up to 128 lanes, which it takes in
memory anyway: said in the shape, it keeps XLA from copying the pool into another layout. Scales are
`[page, 2 * kv_heads, page_size]` float32, tokens along lanes like the scores they multiply, rounded up
to whole 128 for the same reason.

Queries are cut into tiles of a few tokens by all query heads of a kv head, and runs of tiles of one
sequence are the kernel's items; new KV is laid out by destination tile. Both are one gather by XLA,
which has to move the heads forward anyway.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention import tpu_kernel
from jblock.pallas_kernels.paged_attention.quantize import is_scaled, quantize
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.tpu_blocks import TUNING, Blocks, Shape
from jblock.pallas_kernels.pieces import piece_bound, pieces

LEAST_ROWS = 4
"""Rows of a query tile are a multiple of it: half a register tile of bfloat16, as decoding has few."""

_VMEM_BYTES = 64 * 2**20
_SMEM_BYTES = 2**20 - 2**14  # of every TPU, less what the compiler puts beside the scalars
_WRITES_IN_FLIGHT = 8


def abstract_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(pages,) of one layer, or (pages, scales) if the dtype has scales."""
    rows = tile_rows(page_size, dtype)
    pages = (num_pages, 2, num_kv_heads, page_size // rows, rows, _lanes(head_dim))
    scales = (num_pages, 2 * num_kv_heads, _lanes(page_size))
    if not is_scaled(dtype):
        return (jax.ShapeDtypeStruct(pages, dtype),)
    return jax.ShapeDtypeStruct(pages, dtype), jax.ShapeDtypeStruct(scales, jnp.float32)


def _lanes(count: int) -> int:
    return -(-count // tpu_kernel.LANES) * tpu_kernel.LANES


def tile_rows(page_size: int, dtype: jnp.dtype) -> int:
    """Tokens of a register tile; of a page that is not whole tiles, what divides it."""
    rows = 32 // dtype.itemsize
    while page_size % rows:
        rows //= 2
    return rows


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    *,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks | None = None,
    interpret: pltpu.InterpretParams | bool = False,
    device_kind: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `api.paged_attention`; products are in bfloat16 unless the pages are float32.

    Args beyond it:
      blocks: how to cut the work; None: as tuned for the device.
      interpret: as of pallas_call.
      device_kind: whose tuned block sizes to take; None: those of the first device.
    """
    pages = kv_pages[0]
    _, _, kv_heads, tiles, tile, lanes = pages.shape
    page_size, head_dim = tiles * tile, q.shape[2]
    if blocks is None:
        shape = Shape(
            heads=q.shape[1],
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            kv_dtype=pages.dtype.name,
            max_q_len=1 << (ragged.max_q_len - 1).bit_length(),
        )
        blocks = TUNING.blocks_for(shape, device_kind)
    like = q
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, lanes - head_dim))) for a in (q, k, v))
    compute = jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16

    queries, tile_row, row_used = _query_tiles(q.astype(compute), kv_heads, ragged, blocks)
    plan = _plan(ragged, q.shape[0], blocks, tile, page_size, scaled=len(kv_pages) > 1)
    new = _new_tiles(k, v, pages.dtype, ragged, plan)
    out, *updated = _call(
        queries,
        new,
        kv_pages,
        plan,
        ragged,
        blocks,
        q.dtype,
        sliding_window,
        softcap,
        scale,
        interpret,
    )
    # (N, K, G * B, d) -> rows; what no row uses goes to a row that does not exist.
    groups, size = q.shape[1] // kv_heads, blocks.q_tokens
    out = out[:, :, : groups * size, :head_dim].reshape(-1, kv_heads, groups, size, head_dim)
    out = out.transpose(0, 3, 1, 2, 4).reshape(-1, q.shape[1], head_dim)
    row = jnp.where(row_used, tile_row, q.shape[0]).reshape(-1)
    return jnp.zeros_like(like).at[row].set(out, mode="drop"), tuple(updated)


def _query_tiles(
    q: jax.Array, kv_heads: int, ragged: Ragged, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[N, kv_heads, rows, d] with row `g * q_tokens + t` of a tile its token t under query head g of
    the kv head, then padding; and int32 [N, q_tokens] which row of q each token is, and whether any."""
    num_rows, heads, d = q.shape
    groups, size = heads // kv_heads, blocks.q_tokens
    zeros = jnp.zeros_like(ragged.q_lens)
    bound = piece_bound(ragged.num_seqs, ragged.max_q_len, num_rows, size)
    seq, number, total = pieces(zeros, ragged.q_lens, size, bound)
    token = number[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    used = (token < ragged.q_lens[seq][:, None]) & (jnp.arange(bound) < total)[:, None]
    row = jnp.clip(ragged.row_starts[seq][:, None] + token, 0, num_rows - 1)
    tiles = q[row].reshape(bound, size, kv_heads, groups, d).transpose(0, 2, 3, 1, 4)
    tiles = tiles.reshape(bound, kv_heads, groups * size, d)
    padding = -(groups * size) % LEAST_ROWS
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, padding), (0, 0))), row, used


def _plan(
    ragged: Ragged, num_rows: int, blocks: Blocks, tile: int, page_size: int, scaled: bool
) -> tpu_kernel.Plan:
    """The kernel's index arrays."""
    starts = ragged.kv_lens - ragged.q_lens
    zeros = jnp.zeros_like(starts)

    size = blocks.q_tokens * blocks.q_tiles
    seq, number, num_items = pieces(
        zeros,
        ragged.q_lens,
        size,
        piece_bound(ragged.num_seqs, ragged.max_q_len, num_rows, size),
    )
    tiles = (ragged.q_lens + blocks.q_tokens - 1) // blocks.q_tokens
    before = jnp.cumsum(tiles) - tiles
    left = ragged.q_lens[seq] - number * size
    # An empty grid is nowhere promised to run nothing. Without any item there is one of the first token of
    # some page, whose result no row takes.
    first = jnp.where(num_items > 0, starts[seq] + number * size, 0)
    items = (
        seq,
        before[seq] + number * blocks.q_tiles,
        jnp.clip((left + blocks.q_tokens - 1) // blocks.q_tokens, 1, blocks.q_tiles),
        first,
        first + jnp.clip(left, 1, size),
    )

    def writes(size: int) -> tpu_kernel.Writes:
        end = jnp.where(ragged.q_lens > 0, ragged.kv_lens, 0)
        bound = piece_bound(ragged.num_seqs, ragged.max_q_len, num_rows, size)
        seq, number, count = pieces(starts, end, size, bound)
        begin = number * size
        page = jnp.take_along_axis(
            ragged.page_table[seq], (begin // page_size)[:, None], axis=1, mode="clip"
        )[:, 0]
        return tpu_kernel.Writes(
            count=count,
            seq=seq,
            page=page,
            part=(begin % page_size) // size,
            first=jnp.clip(starts[seq] - begin, 0, size),
            last=jnp.clip(end[seq] - begin, 0, size),
            begin=begin,
            size=size,
        )

    return tpu_kernel.Plan(
        num_items=jnp.maximum(num_items, 1),
        items=items,
        tiles=writes(tile),
        scales=writes(page_size) if scaled else None,
    )


def _new_tiles(
    k: jax.Array, v: jax.Array, dtype: jnp.dtype, ragged: Ragged, plan: tpu_kernel.Plan
) -> tuple[jax.Array, ...]:
    """New KV by destination: [N, 2, kv_heads, R, d] and, scaled, [M, 2 * kv_heads, page_size]; zeros
    where a destination holds nothing new (page_size in whole lanes). In decoding, where it holds one new
    token, only that, in float32: [N, 2, kv_heads, 1, d] and [M, 2 * kv_heads, 1]."""
    starts = ragged.kv_lens - ragged.q_lens
    alone = ragged.max_q_len == 1

    def gather(rows: jax.Array, writes: tpu_kernel.Writes) -> jax.Array:
        offset = jnp.arange(writes.size, dtype=jnp.int32)
        if alone:
            rows, offset = rows.astype(jnp.float32), writes.first[:, None]
        new = (offset >= writes.first[:, None]) & (offset < writes.last[:, None])
        token = writes.begin[:, None] + offset - starts[writes.seq][:, None]
        row = jnp.clip(ragged.row_starts[writes.seq][:, None] + token, 0, rows.shape[0] - 1)
        new = new.reshape(*new.shape, *[1] * (rows.ndim - 1))
        return jnp.where(new, rows[row], jnp.zeros((), rows.dtype))

    both = jnp.stack([k, v], axis=1)  # (T, 2, K, d)
    if plan.scales is None:
        return (gather(both.astype(dtype), plan.tiles).transpose(0, 2, 3, 1, 4),)
    values, scales = quantize(both, dtype)
    pages = gather(scales, plan.scales)  # (M, page_size, 2, K)
    laid = pages.reshape(*pages.shape[:2], -1).transpose(0, 2, 1)
    if not alone:
        laid = jnp.pad(laid, ((0, 0), (0, 0), (0, -plan.scales.size % tpu_kernel.LANES)))
    return gather(values, plan.tiles).transpose(0, 2, 3, 1, 4), laid


def _call(
    queries: jax.Array,
    new: tuple[jax.Array, ...],
    kv_pages: tuple[jax.Array, ...],
    plan: tpu_kernel.Plan,
    ragged: Ragged,
    blocks: Blocks,
    out_dtype: jnp.dtype,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
    interpret: pltpu.InterpretParams | bool,
) -> tuple[jax.Array, ...]:
    """[N, kv_heads, rows, d] attended, and the updated pages."""
    _, kv_heads, rows, d = queries.shape
    pages = kv_pages[0]
    tiles, tile = pages.shape[3:5]
    scalars = [*plan.items, ragged.page_table.reshape(-1)]
    for writes in (plan.tiles, plan.scales):
        if writes is not None:
            scalars += [writes.count[None], writes.page, writes.part, writes.first]
    _check_scalars(scalars, ragged.page_table.shape)
    destinations = [(2, kv_heads, tile, d), *(a.shape[1:] for a in kv_pages[1:])]
    q_buffer = (2, blocks.q_tiles, kv_heads, rows, d)
    state = (blocks.q_tiles, kv_heads, rows)
    scratch = {
        "q": pltpu.VMEM(q_buffer, queries.dtype),
        "out": pltpu.VMEM(q_buffer, out_dtype),
        "kv": pltpu.VMEM((2, 2, kv_heads, blocks.kv_pages * tiles, tile, d), pages.dtype),
        "best": pltpu.VMEM((*state, tpu_kernel.LANES), jnp.float32),
        "total": pltpu.VMEM((*state, tpu_kernel.LANES), jnp.float32),
        "acc": pltpu.VMEM((*state, d), jnp.float32),
        "writes": [
            tpu_kernel.WriteBuffers(
                new=pltpu.VMEM((_WRITES_IN_FLIGHT, *a.shape[1:]), a.dtype),
                old=pltpu.VMEM((_WRITES_IN_FLIGHT, *old), pool.dtype),
                read=pltpu.SemaphoreType.DMA((_WRITES_IN_FLIGHT,)),
                write=pltpu.SemaphoreType.DMA((_WRITES_IN_FLIGHT,)),
            )
            for a, pool, old in zip(new, kv_pages, destinations, strict=True)
        ],
        "sems": pltpu.SemaphoreType.DMA((3, 2)),
        "turn": pltpu.SMEM((1,), jnp.int32),
    }
    if len(kv_pages) > 1:
        scratch["scale"] = pltpu.VMEM((2, blocks.kv_pages, *kv_pages[1].shape[1:]), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    first_pool = len(scalars) + 1 + len(new)
    return pl.pallas_call(
        functools.partial(
            tpu_kernel.kernel,
            num_arrays=len(kv_pages),
            blocks=blocks,
            max_pages=ragged.page_table.shape[1],
            sliding_window=sliding_window,
            softcap=softcap,
            scale=scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.num_items,),
            in_specs=[anywhere] * (1 + len(new) + len(kv_pages)),
            out_specs=[anywhere] * (1 + len(kv_pages)),
            scratch_shapes=[scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, out_dtype),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kv_pages),
        ],
        input_output_aliases={first_pool + i: 1 + i for i in range(len(kv_pages))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*scalars, queries, *new, *kv_pages)


def _check_scalars(scalars: Sequence[jax.Array], page_table: tuple[int, ...]) -> None:
    """Raises ValueError where they, int32, do not fit a TPU's scalar memory."""
    taken = sum(4 * _lanes(a.size) for a in scalars)
    if taken > _SMEM_BYTES:
        raise ValueError(
            f"a page table of {page_table[0]} sequences by {page_table[1]} pages, and what goes with it, "
            f"takes {taken} bytes of a TPU's scalar memory, which has room for {_SMEM_BYTES}: give a "
            "larger page_size, a smaller max_model_len, or a smaller max_num_seqs"
        )
