"""Paged attention on TPU: what is around the Mosaic kernel of `tpu_kernel.py`.

Pages are `[page, 2 (k, v), kv_head, page_size / R, R, d]` with R the rows of a register tile (8 of
float32, 16 of bfloat16, 32 of 8 bits): a page is one copy for both and all heads, a head's tokens lie as
the matrix unit wants them, and since the two last dimensions are exactly one tile, a copy may
begin and end at any tile of a page. d is the head's width rounded up to 128 lanes, which it takes in
memory anyway: said in the shape, it keeps XLA from copying the pool into another layout. Scales are
`[page, 2 * kv_heads, page_size]` float32, tokens along lanes like the scores they multiply, rounded up
to whole 128 for the same reason.

Queries and results are `[T, kv_heads, G, d]`, new keys and values `[T, kv_heads, 1, d]` in float32: to
XLA a bitcast of `[T, heads, d]`, as the heads of a kv head are a register tile of their own. G is rounded
up to what such a tile can have, for which queries are padded where a model's ratio is none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jblock.pallas_kernels.paged_attention import tpu_kernel, tpu_many_rows, tpu_refs, tpu_softmax
from jblock.pallas_kernels.paged_attention.quantize import is_scaled, quantize
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.tpu_blocks import TUNING, Blocks, Shape

_VMEM_BYTES = 64 * 2**20
_SMEM_BYTES = 2**20 - 2**14  # of every TPU, less what the compiler puts beside the scalars


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
    return _whole(count, tpu_refs.LANES)


def _whole(count: int, unit: int) -> int:
    """The least multiple of `unit` that is not under `count`."""
    return -(-count // unit) * unit


def tile_rows(page_size: int, dtype: jnp.dtype) -> int:
    """Tokens of a register tile; of a page that is not whole tiles, what divides it."""
    rows = 32 // dtype.itemsize
    while page_size % rows:
        rows //= 2
    return rows


def padded_groups(groups: int, dtype: jnp.dtype) -> int:
    """The least number not under `groups` of rows that are whole register tiles without a gap: a power of
    two up to 8, at least what shares a word, or a multiple of 8."""
    least = max(groups, 4 // dtype.itemsize)
    return -(-least // 8) * 8 if least > 8 else 1 << (least - 1).bit_length()


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
    (num_rows, heads, head_dim), groups = q.shape, q.shape[1] // kv_heads
    if blocks is None:
        shape = Shape(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=tiles * tile,
            kv_dtype=pages.dtype.name,
            max_q_len=1 << (ragged.max_q_len - 1).bit_length(),
        )
        blocks = TUNING.blocks_for(shape, device_kind)
    compute = jnp.dtype(jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16)
    padded = padded_groups(groups, compute)
    padding = (0, 0), (0, lanes - head_dim)
    queries = jnp.pad(
        q.astype(compute).reshape(num_rows, kv_heads, groups, head_dim),
        ((0, 0), (0, 0), (0, padded - groups), padding[1]),
    )
    form = tpu_softmax.Form(
        blocks=blocks,
        kv_heads=kv_heads,
        groups=padded,
        head_dim=lanes,
        tile=tile,
        page_size=tiles * tile,
        scaled=len(kv_pages) > 1,
        dtype=compute,
        sliding_window=sliding_window,
        softcap=softcap,
        scale=scale,
    )
    k, v = (jnp.pad(a, ((0, 0), *padding)) for a in (k, v))
    k, v, scales = _rounded(k, v, pages.dtype)
    rows = tpu_refs.Rows(q=queries, k=k[:, :, None], v=v[:, :, None], scales=scales)
    out, updated = _call(rows, kv_pages, ragged, form, interpret)
    out = out[:, :, :groups, :head_dim].reshape(num_rows, heads, head_dim)
    return out.astype(q.dtype), updated


def _rounded(
    k: jax.Array, v: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """New keys and values as their pages can hold them, float32 [T, kv_heads, d], and float32 [T, 1, lanes]
    scales: those of k's heads, then those of v's."""
    if not is_scaled(dtype):
        # Not back and forth, which XLA may leave out: the kernel rounds.
        return k.astype(jnp.float32), v.astype(jnp.float32), None
    values, scales = quantize(jnp.stack([k, v], axis=1), dtype)  # (T, 2, K, d), (T, 2, K)
    laid = scales.reshape(scales.shape[0], 1, -1)
    laid = jnp.pad(laid, ((0, 0), (0, 0), (0, _lanes(laid.shape[2]) - laid.shape[2])))
    values = values.astype(jnp.float32)
    return values[:, 0], values[:, 1], laid


def _call(
    rows: tpu_refs.Rows,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    form: tpu_softmax.Form,
    interpret: pltpu.InterpretParams | bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """[T, kv_heads, G, d] attended, and the updated pages."""
    batch = tpu_refs.Batch(
        row_starts=ragged.row_starts,
        q_lens=ragged.q_lens,
        kv_lens=ragged.kv_lens,
        page_table=ragged.page_table.reshape(-1),
    )
    _check_scalars(batch, ragged.page_table.shape)
    pools = tpu_refs.Pools(pages=kv_pages[0], scales=kv_pages[1] if form.scaled else None)
    compute = tpu_many_rows.ManyRows if form.blocks.many_rows else tpu_softmax.FewRows
    kernel = functools.partial(
        tpu_kernel.kernel,
        compute=functools.partial(compute, form),
        blocks=form.blocks,
        max_pages=ragged.page_table.shape[1],
        sliding_window=form.sliding_window,
    )
    rows_and_out = rows.q, pools
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    first_pool = len(jax.tree.leaves((batch, rows)))
    out, updated = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=jax.tree.map(lambda _: anywhere, (rows, pools)),
            out_specs=jax.tree.map(lambda _: anywhere, rows_and_out),
            scratch_shapes=[_scratch(rows, kv_pages, form, compute.scratch(form))],
        ),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), rows_and_out),
        input_output_aliases={first_pool + i: 1 + i for i in range(len(kv_pages))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=_VMEM_BYTES,
            # The compiler's own checks take some 70 bundles a copy, of which an item makes 24, and halt the
            # chip. `Walk` holds page ids, rows and lengths, all that comes from outside, within the arrays.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(batch, rows, pools)
    return out, tuple(jax.tree.leaves(updated))


def _scratch(
    rows: tpu_refs.Rows,
    kv_pages: tuple[jax.Array, ...],
    form: tpu_softmax.Form,
    softmax: tpu_softmax.FewState | tpu_many_rows.ManyState,
) -> Any:
    """The kernel's buffers, a `tpu_refs.Scratch`."""
    blocks, buffers = form.blocks, tpu_refs.KV_BUFFERS
    tokens = blocks.q_tokens * blocks.q_tiles
    tiles = form.block // form.tile
    queries = pltpu.VMEM((2, tokens, form.kv_heads, form.groups, form.head_dim), form.dtype)
    # An item's first token may be the last of a tile, and what is new is read by whole tiles.
    rows_new = _whole(tokens + form.tile - 1, form.tile)
    new = (form.kv_heads, rows_new) if blocks.many_rows else (rows_new, form.kv_heads)
    scales = new_scales = None
    if rows.scales is not None:
        scales = pltpu.VMEM((buffers, blocks.kv_pages, *kv_pages[1].shape[1:]), jnp.float32)
        lanes = rows.scales.shape[2]
        scales_new = _whole(tokens + form.page_size - 1, form.page_size)
        new_scales = pltpu.VMEM((2, scales_new, 1, lanes), jnp.float32)
    return tpu_refs.Scratch(
        q=queries,
        out=queries,
        new=pltpu.VMEM((2, 2, *new, 1, form.head_dim), jnp.float32),
        new_scales=new_scales,
        kv=pltpu.VMEM(
            (buffers, 2, form.kv_heads, tiles, form.tile, form.head_dim), kv_pages[0].dtype
        ),
        scales=scales,
        softmax=softmax,
        turns=pltpu.SMEM((2,), jnp.int32),
        out_tokens=pltpu.SMEM((2,), jnp.int32),
        tiles_written=pltpu.SMEM((buffers,), jnp.int32),
        scales_written=pltpu.SMEM((buffers,), jnp.int32),
        q_sems=pltpu.SemaphoreType.DMA((2,)),
        kv_sems=pltpu.SemaphoreType.DMA((buffers,)),
        out_sems=pltpu.SemaphoreType.DMA((2,)),
        write_sems=pltpu.SemaphoreType.DMA((buffers,)),
        scale_sems=pltpu.SemaphoreType.DMA((buffers,)),
    )


def _check_scalars(batch: tpu_refs.Batch, page_table: tuple[int, ...]) -> None:
    """Raises ValueError where they, int32, do not fit a TPU's scalar memory."""
    taken = sum(4 * _lanes(a.size) for a in jax.tree.leaves(batch))
    if taken > _SMEM_BYTES:
        raise ValueError(
            f"a page table of {page_table[0]} sequences by {page_table[1]} pages, and what goes with it, "
            f"takes {taken} bytes of a TPU's scalar memory, which has room for {_SMEM_BYTES}: give a "
            "larger page_size, a smaller max_model_len, or a smaller max_num_seqs"
        )
