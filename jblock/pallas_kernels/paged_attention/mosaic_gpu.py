"""Ragged paged attention for NVIDIA Hopper GPUs, in Pallas Mosaic GPU.

Pages are `[page, kv_head, token, d]`, keys and values alike: what one block of the kernel reads of a page is
one run of memory, brought by one TMA copy. Scales of 8-bit pages are `[page, kv_head, token]`, K's and V's
apart, and come the same way; XLA writes those of new tokens.
Query heads of a KV head share a tile (rows are tokens x
heads), so decoding reads every key once; where tiles are too few to fill the chip, several blocks share the
keys of one (flash-decoding) and XLA combines their parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper
from jblock.pallas_kernels.paged_attention import gpu_kernel, gpu_refs, gpu_walk, xla
from jblock.pallas_kernels.paged_attention.gpu_plan import (
    ROWS,
    WRITE_ROWS,
    Plan,
    scratch,
    token_rows,
)
from jblock.pallas_kernels.paged_attention.quantize import is_scaled, quantize
from jblock.pallas_kernels.paged_attention.ragged import Ragged

_SCRATCH = 2048
"""Bytes of shared memory that the reductions take."""


def abstract_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(k, v) pages of one layer, or (k, v, k_scales, v_scales) if the dtype has scales; XLA's where the
    kernel does not serve them."""
    if not serves(page_size, head_dim, dtype):
        return xla.abstract_pages(num_pages, page_size, num_kv_heads, head_dim, dtype)
    pages = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), dtype)
    scales = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size), jnp.float32)
    return (pages, pages, scales, scales) if is_scaled(dtype) else (pages, pages)


def serves(page_size: int, head_dim: int, dtype: Any) -> bool:
    """Whether the kernel takes such pages. Others are laid out and attended to as XLA's.

    sm_90 has no float32 matmul, TMA brings whole pages or blocks of 64 or 128 keys, with 8 bits 64 at a time,
    and no swizzle is narrower than 32 bytes.
    """
    if not 16 <= head_dim <= 256 or head_dim % 16 or jnp.dtype(dtype) == jnp.float32:
        return False
    if is_scaled(dtype):
        return head_dim % 32 == 0 and (page_size == 64 or page_size % 128 == 0)
    return page_size in (8, 16, 32, 64) or page_size % 128 == 0


def make_plan(
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    max_pages: int,
    num_seqs: int,
    max_q_len: int,
    kv_dtype: Any,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
) -> Plan:
    """Tile sizes for a shape: two compute warpgroups where sequences bring more rows than one holds."""
    groups, kv_dtype, scaled = heads // kv_heads, jnp.dtype(kv_dtype), is_scaled(kv_dtype)
    if not serves(page_size, head_dim, kv_dtype) or token_rows(groups, head_dim) > ROWS:
        raise NotImplementedError(
            f"KV of {kv_dtype.name}, page_size {page_size}, {heads} heads, {kv_heads} KV heads of {head_dim} "
            f"on Mosaic GPU: want what `serves` says, and at most {ROWS} heads a KV head"
        )
    tokens = ROWS // token_rows(groups, head_dim)
    long = max_q_len > tokens
    # With 8 bits a block takes registers to be widened, and the wide one room.
    block_kv = 128 if long and head_dim <= 128 and not scaled else 64
    values = block_kv * head_dim
    queries = 4 * ROWS * head_dim  # of a warpgroup
    item = kv_dtype.itemsize
    block = 2 * values * item + (2 * 4 * block_kv if scaled else 0)
    write_row = token_rows(1, head_dim, item) * head_dim * item
    room = hopper.SHARED_MEMORY - _SCRATCH - 2 * WRITE_ROWS * write_row

    def wide(warpgroups: int) -> int:
        return (warpgroups + 1) * 2 * values if scaled else 0  # keys and values

    pair = long and room >= 2 * queries + wide(2) + (2 if scaled else 1) * block
    warpgroups = 2 if pair else 1
    room -= warpgroups * queries + wide(warpgroups)
    tiles = gpu_walk.num_tiles(rows, num_seqs, max_q_len, warpgroups * tokens)
    splits = 1
    if not long:
        fill = -(-2 * hopper.MULTIPROCESSORS // (tiles * kv_heads))
        part = ROWS * (head_dim + 1) * 4
        if room < part + block:
            fill = 1  # no room for parts
        visible = min(max_pages * page_size, sliding_window or max_pages * page_size)
        splits = max(1, min(fill, visible // 256))
        room -= (splits > 1) * part
    stages = min(8 if scaled else 4, room // block)
    return Plan(
        groups=groups,
        head_dim=head_dim,
        page_size=page_size,
        max_q_len=max_q_len,
        kv_dtype=kv_dtype,
        compute_warpgroups=warpgroups,
        block_kv=block_kv,
        stages=stages,
        splits=splits,
        sliding_window=sliding_window,
        softcap=softcap,
        scale=scale,
    )


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
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `api.paged_attention`; interpret: parameters of the Mosaic GPU interpreter, for tests.

    Raises:
      NotImplementedError: more than 64 query heads a KV head.
    """
    page_size, head_dim = kv_pages[1].shape[2:]  # of V pages, which lie as XLA's do
    if not serves(page_size, head_dim, kv_pages[1].dtype):
        return xla.paged_attention(
            q, k, v, kv_pages, ragged, sliding_window=sliding_window, softcap=softcap, scale=scale
        )
    plan = plan_of(
        q, k, kv_pages, ragged, sliding_window=sliding_window, softcap=softcap, scale=scale
    )
    return run(plan, q, k, v, kv_pages, ragged, interpret=interpret)


def plan_of(
    q: jax.Array, k: jax.Array, kv_pages: tuple[jax.Array, ...], ragged: Ragged, **options: Any
) -> Plan:
    """make_plan for the shapes of a call."""
    rows, heads, d = q.shape
    return make_plan(
        rows=rows,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=d,
        page_size=kv_pages[0].shape[2],
        max_pages=ragged.page_table.shape[1],
        num_seqs=ragged.num_seqs,
        max_q_len=ragged.max_q_len,
        kv_dtype=kv_pages[0].dtype,
        **options,
    )


def run(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The kernel under a given plan (make_plan's, or one that is being tried)."""
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    tiles = gpu_walk.tile_table(ragged, rows, plan.tile_tokens)
    bf16, scales = jnp.bfloat16, kv_pages[2:]
    arrays: dict[str, Any] = {"q": q.astype(bf16)}
    if plan.scaled:
        (k_rows, k_scale), (v_rows, v_scale) = (quantize(new, plan.kv_dtype) for new in (k, v))
        scales = (
            write_scales(scales[0], k_scale, ragged),
            write_scales(scales[1], v_scale, ragged),
        )
        arrays |= {"k_scales": scales[0], "v_scales": scales[1]}
    else:
        k_rows, v_rows = k.astype(bf16), v.astype(bf16)
    arrays |= {"k_rows": k_rows, "v_rows": v_rows}
    starts, order = gpu_walk.new_rows(ragged, rows)

    def placed(a: jax.Array) -> jax.Array:
        return a if order is None else a[order]

    arrays |= {"k_new": hopper.whole_tiles(placed(k_rows))}
    arrays |= {"v_new": hopper.whole_tiles(placed(v_rows))}
    if plan.scaled:
        arrays |= {"k_new_scales": _scales_of_rows(plan, placed(k_scale))}
        arrays |= {"v_new_scales": _scales_of_rows(plan, placed(v_scale))}
    arrays |= {"starts": starts, "tiles": tiles, "page_table": ragged.page_table}
    pages = tuple(jax.new_ref(p, memory_space=plgpu.GMEM) for p in kv_pages[:2])
    arrays |= {"k_pages": pages[0], "v_pages": pages[1]}
    out_type = [jax.ShapeDtypeStruct((plan.splits, rows, heads, d), plan.out_dtype)]
    names = [*arrays, "out"]
    if plan.splits > 1:
        lse = (plan.splits, tiles.shape[0], kv_heads, ROWS)
        out_type.append(jax.ShapeDtypeStruct(lse, jnp.float32))
        names.append("lse")

    def ragged_paged_attention(*refs: Any) -> None:
        named = gpu_refs.Arrays(**dict(zip(names, refs, strict=True)))
        pl.run_scoped(
            lambda **s: gpu_kernel.body(plan, named, gpu_refs.Scratch(**s)),
            collective_axes="wg",
            **scratch(plan),
        )

    # Not `plgpu.kernel`: its batching rule refuses references, and the pages are to be updated in place.
    kernel = pl.kernel(
        ragged_paged_attention,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(kv_heads, tiles.shape[0], plan.splits),
            grid_names=("head", "tile", "split"),
            num_threads=plan.compute_warpgroups + 1,
            thread_name="wg",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        name="ragged_paged_attention",
    )
    parts = kernel(*arrays.values())
    out = parts[0][0] if plan.splits == 1 else _combine(plan, parts[0], parts[1], tiles)
    return out.astype(q.dtype), (*(p[...] for p in pages), *scales)


def _scales_of_rows(plan: Plan, scales: jax.Array) -> jax.Array:
    """[R, K] as [K, over R], whose rows TMA wants at multiples of 16 bytes: a block's are one copy, behind
    the last row too."""
    behind = plan.block_kv + -scales.shape[0] % 4
    return jnp.pad(scales, ((0, behind), (0, 0))).T


def write_scales(pages: jax.Array, new: jax.Array, ragged: Ragged) -> jax.Array:
    """Scales [pages, kv_heads, page_size] with those of new tokens, [T, kv_heads], in their places."""
    row = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None] - ragged.row_starts
    mine = (row >= 0) & (row < ragged.q_lens)
    seq = jnp.argmax(mine, axis=1)
    first = ragged.kv_lens - ragged.q_lens
    position = jnp.take_along_axis(row + first, seq[:, None], axis=1)[:, 0]
    page = ragged.page_table.at[seq, position // pages.shape[2]].get(mode="clip")
    # A row of no sequence goes to a page that does not exist, which a scatter drops.
    page = jnp.where(mine.any(axis=1), page, pages.shape[0])
    return pages.at[page, :, position % pages.shape[2]].set(new, mode="drop")


def _combine(plan: Plan, parts: jax.Array, lse: jax.Array, tiles: jax.Array) -> jax.Array:
    """One softmax from its parts over disjoint keys, each with its log-sum (base 2).

    Args:
      plan: of the kernel that made them.
      parts: float32 [splits, T, heads, d].
      lse: float32 [splits, tiles, kv_heads, 64], a tile's rows as tokens x heads of a KV head.
      tiles: int32 [tiles, 5].
    """
    splits, rows, heads, _ = parts.shape
    num_tiles, kv_heads = lse.shape[1:3]
    tokens, width = plan.warpgroup_tokens, plan.token_rows
    lse = lse[..., : tokens * width].reshape(splits, num_tiles, kv_heads, tokens, width)
    lse = lse[..., : plan.groups].transpose(0, 1, 3, 2, 4)
    lse = lse.reshape(splits, num_tiles * tokens, heads)
    # Where each flat row's sums are: the inverse of "tile t holds rows row .. row + count - 1".
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.where(token < tiles[:, 2:3], tiles[:, 1:2] + token, rows).reshape(-1)
    at = jnp.zeros(rows, jnp.int32).at[row].set(jnp.arange(row.size, dtype=jnp.int32), mode="drop")
    lse = lse[:, at]
    weights = jnp.exp2(lse - lse.max(axis=0))
    weights /= weights.sum(axis=0)
    return jnp.einsum("pth,pthd->thd", weights, parts)
