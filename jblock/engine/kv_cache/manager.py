"""The KV pages of sequences: prefix reuse on admission, growth while decoding, return at the end."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jblock.engine.kv_cache.host_offload import HostCopy, HostPool
from jblock.engine.kv_cache.page_pool import PagePool
from jblock.engine.kv_cache.prefix_keys import token_hashes, token_root
from jblock.engine.kv_cache.sequence_pages import SequencePages
from jblock.engine.kv_cache.spec import KVShape, PoolShape

# Cached pages that a pool keeps when its size changes: a second's worth of copying, at most.
RESIZE_BYTES = 256 * 10**6


class PageStore(Protocol):
    """Where the pages are: the device."""

    def zero_pages(self, shape: KVShape, pages: Sequence[int]) -> None:
        """Zeroes pages."""
        ...

    def copy_out(self, shape: KVShape, pages: Sequence[int]) -> Sequence[Any]:
        """Begins to copy pages to the host."""
        ...

    def copy_in(
        self, shape: KVShape, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        """Overwrites all pages but the first `skip` with their copies."""
        ...


class KVCacheManager:
    """Pages of all KV shapes of an agent. A sequence holds the same number of pages in each of its
    attention layers, so a prefix counts as cached only where all of them have it.

    Attributes:
      pools: by KV shape.
      tables: by KV shape, int32 [layers, max_num_seqs + 1, max_pages]: the pages of the sequence in each
        slot, layer by layer of its chain; 0, the null page, elsewhere, and in the last row, which stands
        for padding.
      host: host-memory copies of the pages of preempted sequences.
      hit_tokens: prompt tokens found in the cache instead of computed.
    """

    def __init__(
        self,
        shapes: Mapping[KVShape, PoolShape],
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
        self.pools = {shape: PagePool(s.num_pages - 1) for shape, s in shapes.items()}
        self.tables: dict[KVShape, np.ndarray] = {}
        self.hit_tokens = 0
        self.host = host or HostPool(0, 0)
        self._page_bytes = {shape: s.page_bytes for shape, s in shapes.items()}
        self._page_size, self._max_num_seqs, self._max_pages = page_size, max_num_seqs, max_pages
        self._store = store
        # Pages that running sequences are about to compute, by content, and by whom.
        self._computing: dict[tuple[bytes, bytes], SequencePages] = {}

    def prefix_in_flight(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> bool:
        """Whether another sequence is about to compute the page this one would compute first: samples
        of one prompt, or requests with a long beginning in common, that come at once. It is worth
        waiting for.

        Args:
          pages: of a sequence that has none.
          tokens: all it has.
          limit: how many of those it may find instead of computing them.
        """
        if pages.host_copy is not None or not self._computing or not pages.layers:
            return False
        hits, limit = self._hits(pages, tokens, limit), limit // self._page_size
        return hits < limit and self._last(pages, pages.hashes[hits]) in self._computing

    def cached_tokens(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> int:
        """How many leading tokens a sequence without pages would find now; `admit` finds them."""
        return self._hits(pages, tokens, limit) * self._page_size

    def admit(
        self, pages: SequencePages, slot: int, tokens: Sequence[int], limit: int
    ) -> int | None:
        """Gives a sequence pages for all its tokens and one more: cached ones first, then those copied to
        the host, then zeroed ones.

        Args:
          pages: of a sequence that has none.
          slot: its row in the tables.
          tokens: all it has.
          limit: how many of those it may find instead of computing them.

        Returns:
          How many tokens need no computing; None: not enough pages, nothing changed.
        """
        copy = pages.host_copy
        hits = self._hits(pages, tokens, limit)
        count = self._pages_for(len(tokens) + 1)
        found = self._found(pages, hits)
        for shape, ids in found.items():
            self.pools[shape].add_owner(ids)
        if any(self.pools[s].num_free < (count - hits) * len(d) for s, d in pages.layers.items()):
            for shape, ids in found.items():
                self.pools[shape].free(ids)
            return None
        pages.slot = slot
        for shape, ids in found.items():
            self._fill(pages, shape, 0, ids)
        pages.count = hits
        computed = hits * self._page_size
        if copy and self._pages_for(copy.tokens) > hits:
            self._extend(pages, self._pages_for(copy.tokens), overwritten=True)
            for shape, digests in pages.layers.items():
                ids = self._ids(pages, shape, pages.count)
                self._store.copy_in(shape, ids, copy.parts[shape], hits * len(digests))
        self._extend(pages, count)
        pages.cached = hits
        if copy:
            computed = max(computed, copy.tokens)
            self.cache(pages, tokens, computed)
            self.drop_copy(pages)
        else:
            self.hit_tokens += computed
        for tokens_hash in self._hashes(pages, tokens)[computed // self._page_size :]:
            self._computing.setdefault(self._last(pages, tokens_hash), pages)
        return computed

    def copy_bytes(self, pages: SequencePages, num_tokens: int) -> int:
        """Bytes of the pages of a sequence's first tokens."""
        each = sum(len(d) * self._page_bytes[shape] for shape, d in pages.layers.items())
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
            for shape, digests in pages.layers.items():
                ids = self.tables[shape][: len(digests), pages.slot, i].tolist()
                self.pools[shape].cache(hashes[i], digests, ids)
            self._computing.pop(self._last(pages, hashes[i]), None)
        pages.cached = max(pages.cached, full)

    def invalidate(self, pages: SequencePages) -> None:
        """Stops everything this sequence computed or found from being found: what it holds is not what its
        key says."""
        for tokens_hash in pages.hashes:
            for shape, digests in pages.layers.items():
                self.pools[shape].invalidate(tokens_hash, digests)

    def release(self, pages: SequencePages) -> None:
        """Gives back all pages."""
        for tokens_hash in pages.hashes:
            last = self._last(pages, tokens_hash)
            if self._computing.get(last) is pages:
                del self._computing[last]
        for shape, digests in pages.layers.items():
            self.pools[shape].free(self._ids(pages, shape, pages.count))
            self.tables[shape][: len(digests), pages.slot, : pages.count] = 0
        pages.slot, pages.count, pages.cached = -1, 0, 0

    def resize(self, shape: KVShape, pool: PoolShape) -> tuple[list[int], list[int]]:
        """Changes the number of pages of a shape, or adds a shape. What is cached is kept up to
        RESIZE_BYTES, for moving it takes time.

        Returns:
          Ids of the pages that are kept, before and after.

        Raises:
          OutOfPages: more pages have an owner than are to be left; nothing changed.
        """
        count, self._page_bytes[shape] = pool.num_pages - 1, pool.page_bytes
        if shape not in self.pools:
            self.pools[shape] = PagePool(count)
            return [], []
        new_id = self.pools[shape].resize(count, RESIZE_BYTES // pool.page_bytes)
        if shape in self.tables:
            self.tables[shape][:] = new_id[self.tables[shape]]
        kept = np.flatnonzero(new_id)
        return kept.tolist(), new_id[kept].tolist()

    def remove(self, shape: KVShape) -> None:
        """Forgets a shape that no sequence holds pages of."""
        self.pools.pop(shape, None)
        self.tables.pop(shape, None)

    def _hits(self, pages: SequencePages, tokens: Sequence[int], limit: int) -> int:
        """How many leading pages, of the first `limit` tokens, are cached in every layer."""
        most = limit // self._page_size
        for i, tokens_hash in enumerate(self._hashes(pages, tokens)[:most]):
            for shape, digests in pages.layers.items():
                if self.pools[shape].lookup(tokens_hash, digests) is None:
                    return i
        return most if pages.layers else 0

    def _found(self, pages: SequencePages, hits: int) -> dict[KVShape, list[int]]:
        """The cached pages among a sequence's first `hits`, page by page."""
        out: dict[KVShape, list[int]] = {}
        for shape, digests in pages.layers.items():
            pool, ids = self.pools[shape], out.setdefault(shape, [])
            for tokens_hash in pages.hashes[:hits]:
                ids += pool.lookup(tokens_hash, digests) or ()
        return out

    def _extend(self, pages: SequencePages, count: int, overwritten: bool = False) -> None:
        """Allocates pages up to `count` in each layer, zeroed unless the caller overwrites them whole."""
        more = count - pages.count
        if more <= 0:
            return
        for shape, digests in pages.layers.items():
            ids = self.pools[shape].allocate(more * len(digests))
            if not overwritten:
                self._store.zero_pages(shape, ids)
            self._fill(pages, shape, pages.count, ids)
        pages.count = count

    def _fill(self, pages: SequencePages, shape: KVShape, first: int, ids: Sequence[int]) -> None:
        """Enters pages into a sequence's row of a table, page by page from `first` on."""
        layers = len(pages.layers[shape])
        new = np.array(ids, np.int32).reshape(-1, layers).T
        self.table(shape, layers)[:layers, pages.slot, first : first + new.shape[1]] = new

    def table(self, shape: KVShape, layers: int) -> np.ndarray:
        """The table of a shape, with rows for so many layers at least."""
        table = self.tables.get(shape)
        if table is None or len(table) < layers:
            wider = np.zeros((layers, self._max_num_seqs + 1, self._max_pages), np.int32)
            if table is not None:
                wider[: len(table)] = table
            self.tables[shape] = table = wider
        return table

    def _ids(self, pages: SequencePages, shape: KVShape, count: int) -> list[int]:
        """A sequence's first `count` pages of every layer, page by page."""
        if not count:
            return []
        layers = len(pages.layers[shape])
        return self.tables[shape][:layers, pages.slot, :count].T.reshape(-1).tolist()

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

    @staticmethod
    def _last(pages: SequencePages, tokens_hash: bytes) -> tuple[bytes, bytes]:
        """What names a page of a whole chain: its tokens and the chain's last attention."""
        return tokens_hash, list(pages.layers.values())[-1][-1]
