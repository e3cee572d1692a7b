"""The pages of sequences: prefix reuse on admission, growth while decoding, return at the end."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jblock.engine.kv_cache.host_offload import HostCopy, HostPool
from jblock.engine.kv_cache.page_pool import PagePool
from jblock.engine.kv_cache.page_tables import PageTables
from jblock.engine.kv_cache.prefix_keys import token_hashes, token_root
from jblock.engine.kv_cache.row_cache import RowCache
from jblock.engine.kv_cache.sequence_pages import Entry, LayerDigests, SequencePages
from jblock.engine.kv_cache.spec import KVShape, PageShape, Pool

# Cached pages that a pool keeps when its size changes: a second's worth of copying, at most.
RESIZE_BYTES = 256 * 10**6


PageKey = tuple[bytes, PageShape, bytes]
"""The hash of all tokens up to a page's end, what the page is of, and the digest that names it."""


class PageStore(Protocol):
    """Where the pages are: the device."""

    def zero_pages(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Zeroes pages."""
        ...

    def copy_out(self, shape: PageShape, pages: Sequence[int]) -> Sequence[Any]:
        """Begins to copy pages to the host."""
        ...

    def copy_in(
        self, shape: PageShape, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        """Overwrites all pages but the first `skip` with their copies."""
        ...


class Span(NamedTuple):
    """Pages of a prompt, `first` to before `end`, that are cached in the layers below a place in its chain.

    Attributes:
      first: where the one above it ends.
      end: the first page that is not cached there.
      most: pages that may be found there.
      below: of each KV shape, how many layers.
      number: of the boundary; None: the whole chain.
    """

    first: int
    end: int
    most: int
    below: Mapping[KVShape, int]
    number: int | None = None


class KVCacheManager:
    """Pages of an agent. A sequence holds the same number of KV pages in each of its attention layers, so a
    prefix counts as cached where all of them have it. Behind that, tokens whose trunk alone is cached, KV
    and the rows that leave it, enter the chain at the boundary above.
    Attributes:
      pools: by shape.
      tables: where they are.
      page_bytes: of one page, by shape.
      host: host-memory copies of the pages of preempted sequences.
      rows: what is kept where chains part.
      hit_tokens: prompt tokens found in the cache instead of computed.
      trunk_tokens: those of which the trunk was found.
    """

    def __init__(
        self,
        shapes: Mapping[PageShape, Pool],
        page_size: int,
        max_num_seqs: int,
        max_pages: int,
        store: PageStore,
        host: HostPool | None = None,
    ):
        """Makes empty pools.

        Args:
          shapes: of the pools.
          page_size: tokens of a page.
          max_num_seqs: sequences that may hold pages at once.
          max_pages: pages of the longest sequence in a layer.
          store: zeroes or overwrites pages whenever they change hands.
          host: memory for copies; None keeps none.
        """
        self.pools: dict[PageShape, PagePool] = {}
        self.pools |= {shape: PagePool(s.num_pages - 1) for shape, s in shapes.items()}
        self.tables = PageTables(max_num_seqs, max_pages)
        self.hit_tokens = self.trunk_tokens = 0
        self.host = host or HostPool(0, 0)
        self.page_bytes = {shape: s.page_bytes for shape, s in shapes.items()}
        self._page_size, self._store = page_size, store
        # What running sequences are about to compute, KV of a whole chain or rows, and who.
        self._computing: dict[PageKey, SequencePages] = {}
        self.rows = RowCache(self.pools, self.tables.table, page_size)

    def prefix_in_flight(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> bool:
        """Whether another sequence is about to compute the page this one would compute first, or its trunk:
        samples of one prompt, requests with a long beginning in common, or one prompt asked of several
        fine-tunes, that come at once. It is worth waiting for.

        Args:
          pages: of a sequence that has none.
          tokens: all it has.
          limit: how many of those it may find instead of computing them.
        """
        if pages.host_copy is not None or not self._computing or not pages.layers:
            return False
        return any(
            span.end < span.most and self._keys(pages, span.end)[span.number] in self._computing
            for span in self._spans(pages, tokens, limit)
        )

    def cached_tokens(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> int:
        """How many leading tokens a sequence without pages would find now, if only their trunk."""
        return self._spans(pages, tokens, limit)[-1].end * self._page_size

    def admit(
        self, pages: SequencePages, slot: int, tokens: Sequence[int], limit: int
    ) -> int | None:
        """Gives a sequence pages for all its tokens and one more: cached ones first, then those copied to
        the host, then zeroed ones. Says in `pages.entries` where tokens enter that are to be computed.

        Args:
          pages: of a sequence that has none.
          slot: its row in the tables.
          tokens: all it has.
          limit: how many of those it may find instead of computing them.

        Returns:
          How many tokens need no computing; None: not enough pages, nothing changed.
        """
        copy = pages.host_copy
        spans = self._spans(pages, tokens, limit)[: 1 if copy else None]
        count, hits = self._pages_for(len(tokens) + 1), spans[0].end
        wanted = {shape: count * len(digests) for shape, digests in pages.layers.items()}
        found = [
            (span, shape, self._found(pages, span, shape)) for span in spans for shape in wanted
        ]
        for _, shape, ids in found:
            self.pools[shape].add_owner(ids)
            wanted[shape] -= len(ids)
        if any(self.pools[shape].num_free < number for shape, number in wanted.items()):
            for _, shape, ids in found:
                self.pools[shape].free(ids)
            return None
        pages.slot = slot
        for span, shape, ids in found:
            layers = range(span.below.get(shape, 0))
            self.tables.write(shape, slot, layers, span.first, ids)
        pages.count, computed = hits, hits * self._page_size
        if copy and self._pages_for(copy.tokens) > hits:
            self._extend(pages, self._pages_for(copy.tokens), overwritten=True)
            for shape, digests in pages.layers.items():
                ids = self._ids(pages, shape, pages.count)
                self._store.copy_in(shape, ids, copy.parts[shape], hits * len(digests))
        for span in spans[1:]:
            self._extend(pages, span.end, span.below)
            if span.number is not None:
                self.rows.hold(pages, span.number, span.first, span.end)
        self._extend(pages, count)
        pages.cached = hits
        pages.entries = [
            Entry(s.end * self._page_size, s.number)
            for s in spans
            if s.number is not None and s.end > s.first
        ]
        if copy:
            computed = max(computed, copy.tokens)
            self.cache(pages, tokens, computed)
            self.drop_copy(pages)
        else:
            self.hit_tokens += computed
            self.trunk_tokens += spans[-1].end * self._page_size - computed
        ends = {span.number: span.end for span in spans}
        for page in range(computed // self._page_size, len(self._hashes(pages, tokens))):
            for number, key in self._keys(pages, page).items():
                if page >= ends.get(number, 0):
                    self._computing.setdefault(key, pages)
        return computed

    def copy_bytes(self, pages: SequencePages, num_tokens: int) -> int:
        """Bytes of the pages of a sequence's first tokens."""
        each = sum(len(d) * self.page_bytes[shape] for shape, d in pages.layers.items())
        return self._pages_for(num_tokens) * each

    def offload(self, pages: SequencePages, num_tokens: int) -> bool:
        """Begins to copy the pages of a sequence's first tokens to the host, before it gives them up.
        False: no room; nothing changed."""
        num_bytes = self.copy_bytes(pages, num_tokens)
        if not num_tokens or not self.host.fits(num_bytes):
            return False
        count = self._pages_for(num_tokens)
        parts = {s: self._store.copy_out(s, self._ids(pages, s, count)) for s in pages.layers}
        pages.host_copy = HostCopy(num_tokens, parts, num_bytes)
        self.host.keep(pages.host_copy)
        return True

    def drop_copy(self, pages: SequencePages) -> None:
        """Forgets what the host holds of a sequence, if anything."""
        if pages.host_copy is not None:
            self.host.drop(pages.host_copy)
            pages.host_copy = None

    def grow(self, pages: SequencePages, num_tokens: int) -> bool:
        """Makes sure a sequence has pages for `num_tokens` tokens. False: none free; nothing changed."""
        more = self._pages_for(num_tokens) - pages.count
        if more <= 0:
            return True
        if any(self.pools[s].num_free < more * len(d) for s, d in pages.layers.items()):
            return False
        self._extend(pages, pages.count + more)
        return True

    def has_uncached(self, pages: SequencePages, num_tokens: int) -> bool:
        """Whether `cache` would have anything to do."""
        return num_tokens // self._page_size > pages.cached

    def cache(self, pages: SequencePages, tokens: Sequence[int], num_tokens: int) -> None:
        """Lets the full pages among a sequence's first `num_tokens` tokens, all of them enqueued for
        computing, be found by others."""
        full = num_tokens // self._page_size
        hashes = self._hashes(pages, tokens)
        for i in range(pages.cached, full):
            for shape, digests in self._digests(pages, i).items():
                ids = self.tables[shape][: len(digests), pages.slot, i].tolist()
                self.pools[shape].cache(hashes[i], digests, ids)
            self.rows.cache(pages, i)
            for key in self._keys(pages, i).values():
                self._computing.pop(key, None)
        pages.cached = max(pages.cached, full)

    def invalidate(self, pages: SequencePages) -> None:
        """Stops everything this sequence computed or found from being found: what it holds is not what its
        key says."""
        for page, tokens_hash in enumerate(pages.hashes):
            for shape, digests in self._digests(pages, page).items():
                self.pools[shape].invalidate(tokens_hash, digests)
        self.rows.invalidate(pages)

    def release(self, pages: SequencePages) -> None:
        """Gives back all pages."""
        for page in range(len(pages.hashes) if self._computing else 0):
            for key in self._keys(pages, page).values():
                if self._computing.get(key) is pages:
                    del self._computing[key]
        for shape, digests in pages.layers.items():
            self.pools[shape].free(self._ids(pages, shape, pages.count))
            self.tables.clear(shape, pages.slot, len(digests), pages.count)
        self.rows.release(pages)
        pages.entries = []
        pages.slot, pages.count, pages.cached = -1, 0, 0

    def resize(self, shape: PageShape, pool: Pool) -> tuple[list[int], list[int]]:
        """Changes the number of pages of a shape, or adds a shape. What is cached is kept up to
        RESIZE_BYTES, for moving it takes time.

        Returns:
          Ids of the pages that are kept, before and after.

        Raises:
          OutOfPages: more pages have an owner than are to be left; nothing changed.
        """
        count, self.page_bytes[shape] = pool.num_pages - 1, pool.page_bytes
        if shape not in self.pools:
            self.pools[shape] = PagePool(count)
            return [], []
        new_id = self.pools[shape].resize(count, RESIZE_BYTES // pool.page_bytes)
        self.tables.renumber(shape, new_id)
        kept = np.flatnonzero(new_id)
        return kept.tolist(), new_id[kept].tolist()

    def remove(self, shape: PageShape) -> None:
        """Forgets a shape that no sequence holds pages of."""
        self.pools.pop(shape, None)
        self.tables.remove(shape)

    def _spans(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> list[Span]:
        """What is cached of a sequence: its first pages in every layer, those behind them below its highest
        boundary, and so on. A trunk may be found of all tokens, if the last one's layers above it are
        computed."""
        hashes = self._hashes(pages, tokens)
        most, full = limit // self._page_size, len(hashes) if limit else 0
        layers = {shape: len(digests) for shape, digests in pages.layers.items()}
        end = self._cached_until(pages, 0, most, layers) if layers else 0
        spans = [Span(0, end, most, layers)]
        for number, boundary in reversed(list(enumerate(pages.boundaries))):
            if boundary.shape in self.pools:
                below, first = boundary.below, spans[-1].end
                end = self._cached_until(pages, first, full, below, number)
                spans.append(Span(first, end, full, below, number))
        return spans

    def _cached_until(
        self,
        pages: SequencePages,
        first: int,
        most: int,
        below: Mapping[KVShape, int],
        number: int | None = None,
    ) -> int:
        """The first page, from `first` to `most`, that is not cached in the layers below a boundary or whose
        rows are not."""
        named: LayerDigests | None = None
        wanted: list[tuple[PageShape, Sequence[bytes]]] = []
        for i in range(first, most):
            if named is not self._digests(pages, i):
                named = self._digests(pages, i)
                wanted = [(shape, named[shape][:count]) for shape, count in below.items()]
                if number is not None:
                    boundary = pages.boundaries[number]
                    wanted.append((boundary.shape, [boundary.digest]))
            if any(self.pools[s].lookup(pages.hashes[i], digests) is None for s, digests in wanted):
                return i
        return max(first, most)

    def _found(self, pages: SequencePages, span: Span, shape: KVShape) -> list[int]:
        """The cached pages of a span, page by page."""
        ids: list[int] = []
        for page in range(span.first, span.end):
            digests = self._digests(pages, page)[shape][: span.below.get(shape, 0)]
            ids += self.pools[shape].lookup(pages.hashes[page], digests) or ()
        return ids

    def _extend(
        self,
        pages: SequencePages,
        count: int,
        above: Mapping[KVShape, int] | None = None,
        overwritten: bool = False,
    ) -> None:
        """Allocates pages up to `count` in each layer, or in those above so many of each shape, zeroed unless
        the caller overwrites them whole."""
        more = count - pages.count
        if more <= 0:
            return
        for shape, digests in pages.layers.items():
            layers = range((above or {}).get(shape, 0), len(digests))
            ids = self.pools[shape].allocate(more * len(layers))
            if not overwritten:
                self._store.zero_pages(shape, ids)
            self.tables.write(shape, pages.slot, layers, pages.count, ids)
        pages.count = count

    def _ids(self, pages: SequencePages, shape: KVShape, count: int) -> list[int]:
        """A sequence's first `count` pages of every layer, page by page."""
        return self.tables.ids(shape, pages.slot, len(pages.layers[shape]), count)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _hashes(self, pages: SequencePages, tokens: Sequence[int]) -> list[bytes]:
        """Hashes of the full pages of `tokens`; each is worked out once."""
        hashes = pages.hashes
        full = len(tokens) // self._page_size
        if len(hashes) < full:
            parent = hashes[-1] if hashes else token_root(pages.salt)
            begin = len(hashes) * self._page_size
            hashes.extend(token_hashes(parent, tokens[begin:], self._page_size))
        return hashes[:full]

    def _digests(self, pages: SequencePages, page: int) -> LayerDigests:
        return pages.digests((page + 1) * self._page_size)

    def _keys(self, pages: SequencePages, page: int) -> dict[int | None, PageKey]:
        """What names a page of a whole chain (None), by the last attention, and one of the rows at each
        boundary that has some."""
        tokens, layers = pages.hashes[page], self._digests(pages, page)
        keys: dict[int | None, PageKey] = {}
        if layers:
            shape, digests = list(layers.items())[-1]
            keys[None] = (tokens, shape, digests[-1])
        for number, boundary in enumerate(pages.boundaries):
            if boundary.shape in self.pools:
                keys[number] = (tokens, boundary.shape, boundary.digest)
        return keys
