"""Where the TPU kernel's arrays and buffers are, with their shapes, and the item that it is at."""

import dataclasses
from typing import Any

from jblock.pallas_kernels.refs import refs

LANES = 128
KV_BUFFERS = 3
ITEM, BLOCK = 0, 1  # of Scratch.turns


@refs
class Batch:
    """The lengths and the page table, in scalar memory."""

    row_starts: Any  # int32 [S]
    q_lens: Any  # int32 [S]
    kv_lens: Any  # int32 [S]
    page_table: Any  # int32 [S * max_pages]


@refs
class Rows:
    """The new tokens, in HBM. G is the query heads of a kv head, and what fills a tile."""

    q: Any  # [T, kv_heads, G, d] of the products' dtype
    k: Any  # float32 [T, kv_heads, 1, d], rounded to the pages' dtype
    v: Any  # likewise
    scales: Any  # float32 [T, 1, lanes], those of k's heads, then those of v's; None: the pages have none


@refs
class Pools:
    """The pages, in HBM, as `tpu.abstract_pages` has them."""

    pages: Any  # [pages, 2, kv_heads, tiles, tile, d]
    scales: Any  # float32 [pages, 2 * kv_heads, lanes]; None: there are none


@refs
class Scratch:
    """Buffers; N is the tokens of an item, B the tiles of a block of pages."""

    q: Any  # [2, N, kv_heads, G, d]
    out: Any  # [2, N, kv_heads, G, d]
    new: Any  # float32 [2, 2, kv_heads, N + tile, 1, d] for many rows, else [2, 2, N + tile, kv_heads, 1, d]
    new_scales: Any  # float32 [2, N + page_size, 1, lanes]; None
    kv: Any  # [KV_BUFFERS, 2, kv_heads, B, tile, d]
    scales: Any  # float32 [KV_BUFFERS, kv_pages, 2 * kv_heads, lanes]; None
    softmax: Any  # as `tpu_softmax` wants them
    turns: Any  # int32 [2] in SMEM: items and blocks until now
    out_tokens: Any  # int32 [2] in SMEM: tokens on their way out of each buffer
    tiles_written: Any  # int32 [KV_BUFFERS] in SMEM: tiles on their way to their pages
    scales_written: Any  # int32 [KV_BUFFERS] in SMEM: pages of scales on their way
    q_sems: Any  # DMA [2], of queries and of new keys and values
    kv_sems: Any  # DMA [KV_BUFFERS]
    out_sems: Any  # DMA [2]
    write_sems: Any  # DMA [KV_BUFFERS]
    scale_sems: Any  # DMA [KV_BUFFERS], of scales written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Some new tokens of a sequence: positions begin .. end - 1; scalars."""

    seq: Any
    begin: Any
    end: Any
