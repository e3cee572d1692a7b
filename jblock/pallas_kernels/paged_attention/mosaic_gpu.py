"""Ragged paged attention for NVIDIA Hopper GPUs, in Pallas Mosaic GPU.

Pages are `[page, kv_head, token, d]`, keys and values alike: what one block of the kernel reads of a page is
one run of memory, brought by one TMA copy. Query heads of a KV head share a tile (rows are tokens x
heads), so decoding reads every key once; where tiles are too few to fill the chip, several blocks share the
keys of one (flash-decoding) and XLA combines their parts.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels.paged_attention import gpu_kernel, gpu_walk
from jblock.pallas_kernels.paged_attention.gpu_kernel import ROWS, Plan, token_rows
from jblock.pallas_kernels.paged_attention.ragged import Ragged

_SHARED_MEMORY = 227 * 1024 - 2048
"""Bytes of shared memory a block may use on sm_90, less a little for barriers."""

_MULTIPROCESSORS = 132


def abstract_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The K and the V page array of one layer."""
    pages = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), dtype)
    return (pages, pages)


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
    groups = heads // kv_heads
    if jnp.dtype(kv_dtype) != jnp.bfloat16:
        raise NotImplementedError(f"KV of dtype {jnp.dtype(kv_dtype).name} on Mosaic GPU")
    if head_dim % 16 or head_dim > 256 or token_rows(groups, head_dim) > ROWS:
        raise NotImplementedError(
            f"{heads} heads, {kv_heads} KV heads of {head_dim} on Mosaic GPU: want at most {ROWS} heads a KV "
            "head and a head_dim that is a multiple of 16 up to 256"
        )
    tokens = ROWS // token_rows(groups, head_dim)
    long = max_q_len > tokens
    block_kv = 128 if long and head_dim <= 128 else 64
    if page_size % 8 or (page_size % block_kv and block_kv % page_size):
        raise NotImplementedError(
            f"page_size {page_size} on Mosaic GPU: want 8, 16, 32, 64 or a multiple of 128"
        )
    warpgroups = 2 if long else 1
    fixed = 2 * warpgroups * ROWS * head_dim * 2 + 2 * 16 * head_dim * 2
    tiles = gpu_walk.num_tiles(rows, num_seqs, max_q_len, warpgroups * tokens)
    splits = 1
    if not long:
        fill = -(-2 * _MULTIPROCESSORS // (tiles * kv_heads))
        visible = min(max_pages * page_size, sliding_window or max_pages * page_size)
        splits = max(1, min(fill, visible // 256))
        fixed += (splits > 1) * ROWS * (head_dim + 1) * 4
    stages = min(4, (_SHARED_MEMORY - fixed) // (2 * block_kv * head_dim * 2))
    return Plan(
        groups=groups,
        head_dim=head_dim,
        page_size=page_size,
        max_q_len=max_q_len,
        kv_dtype=jnp.dtype(kv_dtype),
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
      NotImplementedError: a dtype, head or page size the kernel does not serve.
    """
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
    pages = tuple(jax.new_ref(p, memory_space=plgpu.GMEM) for p in kv_pages)
    out_type = [jax.ShapeDtypeStruct((plan.splits, rows, heads, d), plan.out_dtype)]
    names = ["q", "k_new", "v_new", "tiles", "page_table", "k_pages", "v_pages", "out"]
    if plan.splits > 1:
        lse = (plan.splits, tiles.shape[0], kv_heads, ROWS)
        out_type.append(jax.ShapeDtypeStruct(lse, jnp.float32))
        names.append("lse")

    def ragged_paged_attention(*refs: Any) -> None:
        named = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
        pl.run_scoped(
            lambda **scratch: gpu_kernel.body(plan, named, types.SimpleNamespace(**scratch)),
            collective_axes="wg",
            **gpu_kernel.scratch(plan),
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
    bf16 = jnp.bfloat16
    parts = kernel(q.astype(bf16), k.astype(bf16), v.astype(bf16), tiles, ragged.page_table, *pages)
    out = parts[0][0] if plan.splits == 1 else _combine(plan, parts[0], parts[1], tiles)
    return out.astype(q.dtype), tuple(p[...] for p in pages)


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
