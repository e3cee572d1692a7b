"""The mutable arrays of one agent: registers, KV pools, last tokens, counts of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.engine.kv_cache.spec import PageShape, Pool
from jblock.engine.programs.executables import Executables
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.programs.page_ops import COPY_PAGES, ZERO_PAGES
from jblock.pallas_kernels.paged_attention.api import KvPages
from jblock.parallel.placement import Placement


class DeviceState:
    """Arrays on the device. Programs take them donated and return them; every call enqueues work and returns
    without waiting for it.

    Attributes:
      pool_shapes: of the pools.
      pools: page arrays by shape.
      registers: float32 [num_rows, width] by width.
      last_tokens: int32 [max_num_seqs], by sequence slot.
      counts: int32 [max_num_seqs, vocab] by vocabulary size, once a request has penalties.
    """

    def __init__(self, executables: Executables, pools: Mapping[PageShape, Pool]):
        """Allocates pools and last tokens; registers come with `add_registers`."""
        self._executables = executables
        self._placement: Placement = executables.placement
        self._unclean: dict[PageShape, list[int]] = {}
        self.pool_shapes: dict[PageShape, Pool] = {}
        self.pools: dict[PageShape, KvPages] = {}
        self.registers: dict[int, jax.Array] = {}
        self.counts: dict[int, jax.Array] = {}
        self.last_tokens = self.zeros((executables.geometry.max_num_seqs,), jnp.int32)
        for shape, pool in pools.items():
            self.add_pool(shape, pool)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros with a row for each sequence or register row."""
        return self._placement.zeros(self._placement.struct(shape, dtype, "rows"))

    def put(self, array: np.ndarray, *leading: None) -> jax.Array | np.ndarray:
        """A small array of a batch, on every device; it is not to change any more. For one device numpy's
        stays as it is: a call that has one transfers it in a few microseconds, a transfer before it
        takes over 30.

        Args:
          array: rows are its first axis,
          *leading: or the one behind so many others.
        """
        return self._placement.put(array, *leading, "rows") if self._placement.devices else array

    def set_registers(self, widths: set[int]) -> None:
        """Has registers of these widths and no others."""
        rows = self._executables.geometry.num_rows
        for width in set(self.registers) - widths:
            del self.registers[width]
        for width in widths - set(self.registers):
            self.registers[width] = self.zeros((rows, width), jnp.float32)

    def add_pool(self, shape: PageShape, pool: Pool) -> None:
        """Allocates an empty pool."""
        self.pool_shapes[shape] = pool
        arrays = pool.abstract_arrays(self._placement)
        self.pools[shape] = tuple(self._placement.zeros(a) for a in arrays)

    def remove_pool(self, shape: PageShape) -> None:
        """Frees a pool that no sequence has pages of."""
        del self.pool_shapes[shape], self.pools[shape]
        self._unclean.pop(shape, None)

    def resize_pool(
        self, shape: PageShape, pool: Pool, moves: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        """Gives a pool another size. Its pages go by way of the host, so that both pools are never on the
        device at once. Blocks until it is done.

        Args:
          shape: which pool.
          pool: its new form.
          moves: ids of the pages that are kept, in the old pool and in the new one.
        """
        old, new = moves
        kept = [jax.tree.map(np.asarray, copy) for copy in self.copy_out(shape, old)]
        self.remove_pool(shape)
        self.add_pool(shape, pool)
        self.copy_in(shape, new, kept)

    def zero_pages(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Has pages zeroed that were just handed to a new owner, before anything else is done to pages: many
        in a call, for a burst of requests takes a page or two each."""
        self._unclean.setdefault(shape, []).extend(pages)

    def clean(self) -> None:
        """Enqueues what `zero_pages` put off."""
        for shape, pages in self._unclean.items():
            program = self._program("zero_pages", shape)
            for begin in range(0, len(pages), ZERO_PAGES):
                ids = _filled(pages[begin : begin + ZERO_PAGES], ZERO_PAGES, 0)
                self.pools[shape] = program(self.pools[shape], self.put(ids))
        self._unclean.clear()

    def copy_out(self, shape: PageShape, pages: Sequence[int]) -> list[Any]:
        """Begins to copy pages to the host. What comes back is for `copy_in`, as it is or with its
        arrays taken to the host."""
        self.clean()
        program = self._program("gather_pages", shape)
        copies = []
        for begin in range(0, len(pages), COPY_PAGES):
            ids = _filled(pages[begin : begin + COPY_PAGES], COPY_PAGES, 0)
            copy = program(self.pools[shape], self.put(ids))
            for array in jax.tree.leaves(copy):
                array.copy_to_host_async()
            copies.append(copy)
        return copies

    def copy_in(
        self, shape: PageShape, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        """Overwrites pages with the copies of as many pages; the first `skip` stay as they are."""
        self.clean()
        nowhere = self.pool_shapes[shape].num_pages
        program = self._program("scatter_pages", shape)
        for begin in range(skip // COPY_PAGES * COPY_PAGES, len(pages), COPY_PAGES):
            ids = _filled(pages[begin : begin + COPY_PAGES], COPY_PAGES, nowhere)
            ids[: max(skip - begin, 0)] = nowhere
            copy = copies[begin // COPY_PAGES]
            self.pools[shape] = program(self.pools[shape], copy, self.put(ids))

    def wait(self) -> None:
        """Blocks until all that was enqueued is done."""
        jax.block_until_ready((self.registers, self.pools, self.last_tokens))

    def _program(self, kind: str, shape: PageShape) -> Any:
        return self._executables.get(ProgramKey(kind=kind, pool=self.pool_shapes[shape]))


def _filled(pages: Sequence[int], count: int, filling: int) -> np.ndarray:
    ids = np.full(count, filling, np.int32)
    ids[: len(pages)] = pages
    return ids
