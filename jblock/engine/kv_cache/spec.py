"""The shapes of pages: of KV, and of the rows where chains part.

A page holds the keys and values of `page_size` tokens in one attention layer. Layers of one shape, of
whatever model and depth, take their pages from one pool, so how chains are cut into blocks decides
nothing about where KV lies: a cut moves no page. Rows that leave a trunk which several chains share lie
in pages of their own, of as many tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jblock.blocks.spec import AttentionSpec
from jblock.pallas_kernels.paged_attention.api import abstract_pages, backend_of
from jblock.parallel.placement import SINGLE, Placement


@dataclasses.dataclass(frozen=True, order=True)
class KVShape:
    """What decides the shape of a layer's pages.

    Attributes:
      num_kv_heads: key/value heads of the attention.
      head_dim: width of a head.
    """

    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> "KVShape":
        """The shape of an attention component."""
        return cls(spec.num_kv_heads, spec.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolShape:
    """The page arrays of one KV shape.

    Attributes:
      num_pages: pages of one dp group, page 0 (the null page, always zeros) included.
      page_size: tokens of a page.
      num_kv_heads: heads, one counted once for each device that has it.
      head_dim: width of a head.
      dtype: of the pages.
      backend: of paged attention, which lays the pages.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    backend: str = dataclasses.field(default_factory=backend_of)

    def abstract_arrays(self, placement: Placement = SINGLE) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes, dtypes and shardings of the pool's arrays.

        Each device has a whole pool of the backend's own layout with its share of the KV heads; which
        axis of a layout grows with the heads is asked of the backend.
        """
        ways = placement.rules.ways("heads")
        local = self.num_kv_heads // ways
        out = []
        for one, two in zip(self._pages(local), self._pages(2 * local), strict=True):
            shape = list(one.shape)
            (axis,) = (i for i, (a, b) in enumerate(zip(shape, two.shape, strict=True)) if a != b)
            shape[0] *= placement.rules.ways("rows")
            shape[axis] *= ways
            axes: list[str | None] = ["rows", *[None] * (len(shape) - 1)]
            axes[axis] = "heads"
            out.append(placement.struct(shape, one.dtype, *axes))
        return tuple(out)

    def _pages(self, heads: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return abstract_pages(
            self.num_pages,
            self.page_size,
            heads,
            self.head_dim,
            dtype=self.dtype,
            backend=self.backend,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices of a dp group."""
        arrays = self.abstract_arrays()
        return sum(a.size // self.num_pages * a.dtype.itemsize for a in arrays)


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class RowShape:
    """What decides the shape of a page of rows. All come behind the shapes of KV.

    Attributes:
      width: of the register they come from.
    """

    width: int

    def __lt__(self, other: object) -> bool:
        return isinstance(other, RowShape) and self.width < other.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPool:
    """The pages of rows of one width, float32 as registers are.

    Attributes:
      num_pages: pages of one dp group, page 0 (the null page) included.
      page_size: rows of a page, one a token.
      width: of a row.
      copies: devices of a dp group, each of which holds all of it.
    """

    num_pages: int
    page_size: int
    width: int
    copies: int = 1

    def abstract_arrays(self, placement: Placement = SINGLE) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape, dtype and sharding of the pool's array."""
        pages = self.num_pages * placement.rules.ways("rows")
        shape = (pages, self.page_size, self.width)
        return (placement.struct(shape, jnp.float32, "rows", None, None),)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices of a dp group."""
        return 4 * self.page_size * self.width * self.copies


PageShape = KVShape | RowShape
Pool = PoolShape | RowPool
