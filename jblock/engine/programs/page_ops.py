"""What is done to whole KV pages of a pool: zero, copy out and in."""

import jax
import jax.numpy as jnp

from jblock.pallas_kernels.paged_attention.api import KvPages

# Pages zeroed in one call: many, for a burst of requests takes a few in each layer.
ZERO_PAGES = 64
# Pages copied in one call: few, because a call moves them all even where fewer are wanted.
COPY_PAGES = 64


@jax.named_scope("gather_pages")
def gather_pages(pool: KvPages, pages: jax.Array) -> KvPages:
    """Copies pages out of a pool.

    Args:
      pool: page arrays (not donated).
      pages: int32 [n] page ids; 0, the null page, fills up.
    """
    return tuple(a.at[pages].get(mode="clip") for a in pool)


@jax.named_scope("scatter_pages")
def scatter_pages(pool: KvPages, copies: KvPages, pages: jax.Array) -> KvPages:
    """Overwrites whole pages with copies that `gather_pages` made.

    Args:
      pool: page arrays (donated).
      copies: n pages of each array.
      pages: int32 [n] page ids; ids past the end are dropped.
    """
    return tuple(a.at[pages].set(c, mode="drop") for a, c in zip(pool, copies, strict=True))


@jax.named_scope("zero_pages")
def zero_pages(pool: KvPages, pages: jax.Array) -> KvPages:
    """Zeroes pages that change hands: what an old tenant left can neither leak nor be 0 x NaN.

    Args:
      pool: page arrays (donated).
      pages: int32 [n] page ids, filled up with 0, the null page.
    """

    def zero(i: jax.Array, pool: KvPages) -> KvPages:
        return tuple(a.at[pages[i]].set(0) for a in pool)

    # One page after another: a scatter of all would first make as many pages of zeros.
    return jax.lax.fori_loop(0, jnp.sum(pages > 0), zero, pool)
