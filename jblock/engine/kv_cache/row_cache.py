"""Rows kept where chains part, in pages beside those of KV and found by the same keys."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jblock.engine.kv_cache.page_pool import PagePool
from jblock.engine.kv_cache.sequence_pages import Boundary, SequencePages
from jblock.engine.kv_cache.spec import PageShape


class RowCache:
    """The pages of rows of an agent's sequences: a cache and no more. A sequence holds those that it is about
    to read, and those that it has begun to write, for which it takes only what is free; so nothing waits
    for a page of rows, and nobody gives way for one."""

    def __init__(
        self,
        pools: Mapping[PageShape, PagePool],
        table: Callable[[PageShape, int], np.ndarray],
        page_size: int,
    ):
        """Works on a manager's pools and tables.

        Args:
          pools: by shape; that of a boundary may be missing, and then no rows are kept there.
          table: (shape, rows wanted) -> int32 [boundaries, slots, pages of a sequence].
          page_size: tokens of a page.
        """
        self._pools, self._table, self._page_size = pools, table, page_size

    def hold(self, pages: SequencePages, number: int, first: int, end: int) -> None:
        """Takes hold of the cached rows of some pages at a boundary, until they have been read."""
        boundary = pages.boundaries[number]
        pool, row = self._pools[boundary.shape], self._row(pages, number)
        for i in range(first, end):
            for page in pool.lookup(pages.hashes[i], [boundary.digest]) or ():
                pool.add_owner([page])
                row[i] = page

    def reserve(self, pages: SequencePages, start: int, end: int) -> None:
        """Takes pages for the rows of the prompt's tokens `start` to before `end`, at the boundaries that
        these pass; as far as some are free, and nobody has cached them."""
        entry, size = pages.entry(start), self._page_size
        # Of a page that was begun and not kept, the rest is worth nothing; nor is one that stays half full.
        whole = range(-(-start // size), min(-(-end // size), len(pages.hashes)))
        for number, boundary in enumerate(pages.boundaries):
            pool = self._pools.get(boundary.shape)
            if pool is None or (entry is not None and number <= entry.number):
                continue
            row = self._row(pages, number)
            for i in whole:
                known = pool.lookup(pages.hashes[i], [boundary.digest])
                if known is None and pool.num_free:
                    (row[i],) = pool.allocate(1)

    def cache(self, pages: SequencePages, page: int) -> None:
        """Lets the rows of a full page be found by others, and lets go of them."""
        for boundary, row in self._rows(pages):
            if row[page]:
                ids, pool = [int(row[page])], self._pools[boundary.shape]
                pool.cache(pages.hashes[page], [boundary.digest], ids)
                pool.free(ids)
                row[page] = 0

    def invalidate(self, pages: SequencePages) -> None:
        """Stops the rows of a sequence from being found."""
        for boundary in pages.boundaries:
            if (pool := self._pools.get(boundary.shape)) is not None:
                for tokens_hash in pages.hashes:
                    pool.invalidate(tokens_hash, [boundary.digest])

    def release(self, pages: SequencePages) -> None:
        """Lets go of all rows of a sequence."""
        for boundary, row in self._rows(pages):
            held = row[row > 0].tolist()
            self._pools[boundary.shape].free(held)
            row[:] = 0

    def _rows(self, pages: SequencePages) -> Iterator[tuple[Boundary, np.ndarray]]:
        """Each boundary that rows are kept at, with the sequence's row of the table."""
        for number, boundary in enumerate(pages.boundaries):
            if boundary.shape in self._pools and pages.slot >= 0:
                yield boundary, self._row(pages, number)

    def _row(self, pages: SequencePages, number: int) -> np.ndarray:
        table = self._table(pages.boundaries[number].shape, len(pages.boundaries))
        return table[number, pages.slot]
