"""How many pages the KV pools have."""

import dataclasses
from collections.abc import Mapping, Sequence

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.spec import KVShape, PageShape, Pool, PoolShape, RowPool, RowShape
from jblock.pallas_kernels.paged_attention.api import backend_of
from jblock.parallel.placement import Placement
from jblock.parallel.spread import kv_heads

# Of the budget for rows where chains part, whether they do or not: so a model that comes and shares a
# trunk changes no pool of KV.
ROWS_PART = 16
# Tokens of the longest sequence, where nobody says: page tables are as wide for every sequence.
MOST_CONTEXT = 16384


def pool_shapes(
    layers: Mapping[PageShape, int], budget: int, config: EngineConfig, placement: Placement
) -> dict[PageShape, Pool]:
    """A pool for each shape. Together they take `budget` bytes on all devices. That of KV is shared out so
    that the deepest chain of each shape has room for as many tokens; no pool is larger than max_num_seqs
    sequences can fill. Rows get their part where KV then still holds a sequence of the longest length.

    Args:
      layers: of each KV shape, how many attention layers the deepest chain has; shapes of rows.
      budget: bytes of all pools, their null pages apart.
      config: of the agent.
      placement: the devices.

    Raises:
      ValueError: a pool does not hold one sequence of the longest length where the memory was given, or
        not one page of each layer.
    """
    empty = {s: _empty_pool(s, config, placement) for s in layers if isinstance(s, KVShape)}
    token_page = {shape: layers[shape] * pool.page_bytes for shape, pool in empty.items()}
    total = sum(token_page.values())
    room = budget // ROWS_PART
    if budget - room < config.max_pages * total:
        room = 0
    kv = {
        shape: dataclasses.replace(
            pool, num_pages=1 + _num_pages(budget - room, layers[shape], total, config)
        )
        for shape, pool in empty.items()
    }
    return kv | _row_pools([s for s in layers if isinstance(s, RowShape)], room, config, placement)


def own_context(
    layers: Mapping[PageShape, int],
    longest: int,
    budget: int,
    config: EngineConfig,
    placement: Placement,
) -> int:
    """Tokens of the longest sequence where nobody said how many.

    Args:
      layers: as `pool_shapes` takes them.
      longest: that any of the models takes.
      budget: bytes that one sequence may fill.
      config: of the agent.
      placement: the devices.
    """
    shapes = {s: _empty_pool(s, config, placement) for s in layers if isinstance(s, KVShape)}
    page_bytes = sum(layers[shape] * pool.page_bytes for shape, pool in shapes.items())
    most = min(longest, MOST_CONTEXT)
    if not page_bytes:
        return most
    return min(most, max(round_down(budget // page_bytes), 1) * config.page_size)


def _row_pools(
    shapes: Sequence[RowShape], budget: int, config: EngineConfig, placement: Placement
) -> dict[RowShape, RowPool]:
    """Pools of rows that hold a page at least."""
    most = min(config.max_num_seqs * config.max_pages, config.kv_pages)
    pools = {}
    for shape in shapes:
        pool = RowPool(
            num_pages=1,
            page_size=config.page_size,
            width=shape.width,
            copies=placement.rules.ways("heads"),
        )
        pages = min(round_down(budget // len(shapes) // pool.page_bytes), most)
        if pages:
            pools[shape] = dataclasses.replace(pool, num_pages=1 + pages)
    return pools


def _empty_pool(shape: KVShape, config: EngineConfig, placement: Placement) -> PoolShape:
    return PoolShape(
        num_pages=1,
        page_size=config.page_size,
        num_kv_heads=len(kv_heads(shape.num_kv_heads, config.sharding.ways("heads"))),
        head_dim=shape.head_dim,
        dtype=config.kv_dtype,
        backend=backend_of(placement.platform.name),
    )


def _num_pages(budget: int, layers: int, token_page: int, config: EngineConfig) -> int:
    """Pages of one pool; `token_page` is the bytes of one page in every layer of all pools."""
    each = budget // token_page
    if config.kv_memory_mb and each < config.max_pages:
        raise ValueError(
            f"kv_memory_mb {config.kv_memory_mb} does not hold one sequence of max_model_len "
            f"{config.max_model_len}: give at least {-(-config.max_pages * token_page // 10**6)}, "
            "or a smaller max_model_len"
        )
    if each < 1:
        raise ValueError(
            f"{max(budget, 0) // 10**6} MB of memory for the KV cache do not hold a page of "
            f"{token_page} bytes: serve fewer models, or free memory and start again"
        )
    most = layers * min(config.max_num_seqs * config.max_pages, config.kv_pages)
    least = layers * min(each, config.max_pages)
    return min(max(round_down(layers * each), least), most)


def round_down(pages: int) -> int:
    """The next lower rung of the ladder of pool sizes: 16 to 31 times a power of two. A little more or
    less of free memory then finds the programs of the last start, at most 6% of the memory unused."""
    shift = max(pages.bit_length() - 5, 0)
    return pages >> shift << shift


def most_layers(one: Mapping[PageShape, int], two: Mapping[PageShape, int]) -> dict[PageShape, int]:
    """Of each shape, those of whichever has more."""
    shapes = sorted(one.keys() | two.keys())
    return {shape: max(one.get(shape, 0), two.get(shape, 0)) for shape in shapes}
