"""What is done to pages of a pool: zero, copy out and in; and rows between registers and pages."""

import jax
import jax.numpy as jnp

from jblock.engine.config import Bucket
from jblock.engine.programs.forward import INDEX_COLUMNS
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


@jax.named_scope("write_rows")
def write_rows(
    pool: KvPages, registers: jax.Array, index: jax.Array, pages: jax.Array, *, bucket: Bucket
) -> KvPages:
    """Copies the rows of a batch from their registers to pages.

    Args:
      pool: one float32 array [num_pages, page_size, width] (donated).
      registers: float32 [num_rows, width].
      index: of the batch, as `forward` describes.
      pages: int32 [S, max_pages] of its sequences; rows whose page is 0 are left out.
      bucket: grid of the batch.
    """
    (array,) = pool
    rows, places = _places(array, index, pages, bucket)
    flat = array.reshape(-1, array.shape[-1])
    kept = registers.at[rows].get(mode="clip")
    return (flat.at[places].set(kept, mode="drop").reshape(array.shape),)


@jax.named_scope("read_rows")
def read_rows(
    registers: jax.Array, pool: KvPages, index: jax.Array, pages: jax.Array, *, bucket: Bucket
) -> jax.Array:
    """The same back: `registers` are donated, the pool is not."""
    (array,) = pool
    rows, places = _places(array, index, pages, bucket)
    flat = array.reshape(-1, array.shape[-1])
    rows = jnp.where(places < len(flat), rows, len(registers))
    return registers.at[rows].set(flat.at[places].get(mode="clip"), mode="drop")


def _places(
    array: jax.Array, index: jax.Array, pages: jax.Array, bucket: Bucket
) -> tuple[jax.Array, jax.Array]:
    """Of each row of a batch its register row, and its row among those of all pages: past the end where it
    has none. Both int32 [S * Q]."""
    page_size, q = array.shape[1], bucket.q_len
    ahead = jnp.arange(q, dtype=jnp.int32)
    positions = index[:, :1] + ahead
    columns = jnp.minimum(positions // page_size, pages.shape[1] - 1)
    page = jnp.take_along_axis(pages, columns, axis=1)
    real = (ahead < index[:, 1:2]) & (page > 0)
    places = jnp.where(real, page * page_size + positions % page_size, array.shape[0] * page_size)
    return index[:, INDEX_COLUMNS : INDEX_COLUMNS + q].reshape(-1), places.reshape(-1)
