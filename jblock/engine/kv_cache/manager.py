"""The KV pages of sequences: prefix reuse on admission, growth while decoding, return at the end."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jblock.blocks.spec import AttentionSpec
from jblock.engine.graph.graph import KvGroup
from jblock.engine.kv_cache.host_offload import Copy, HostPool
from jblock.engine.kv_cache.page_pool import PagePool
from jblock.engine.kv_cache.prefix_keys import page_keys, root_key
from jblock.engine.programs.executables import PoolShape
from jblock.engine.scheduling.sequence import Sequence as Seq


class PageStore(Protocol):
    """Where the pages are: the device."""

    def scrub(self, group: KvGroup, pages: Sequence[int]) -> None:
        """Zeroes pages."""
        ...

    def copy_out(self, group: KvGroup, pages: Sequence[int]) -> Sequence[Any]:
        """Begins to copy pages to the host."""
        ...

    def copy_in(
        self, group: KvGroup, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        """Overwrites all pages but the first `skip` with their copies."""
        ...


class KVCacheManager:
    """Pages of every KV group of an agent. A sequence holds the same number of pages in each group its
    chain needs, so a prefix counts as cached only where all of them have it.

    Attributes:
      pools: by group.
      host: copies of the pages of sequences that gave way.
      hit_tokens: prompt tokens found in the cache instead of computed.
    """

    def __init__(
        self,
        shapes: Mapping[KvGroup, PoolShape],
        page_size: int,
        store: PageStore,
        host: HostPool | None = None,
    ):
        """`store` zeroes or overwrites pages whenever they change hands; no `host` keeps no copies."""
        self.pools = {g: PagePool(s.num_pages - 1, 1) for g, s in shapes.items()}
        self.hit_tokens = 0
        # Pages that running sequences are about to compute, by content, and by whom.
        self._computing: dict[tuple[KvGroup, bytes], Seq] = {}
        self._page_size = page_size
        self._store = store
        self.host = host or HostPool(0, 0)
        self._page_bytes = {g: s.page_bytes for g, s in shapes.items()}

    def awaits(self, sequence: Seq) -> bool:
        """Whether another sequence is about to compute the page this one would compute first: samples
        of one prompt, or requests with a long beginning in common, that come at once. It is worth
        waiting for."""
        if sequence.copy is not None:
            return False
        _, hits = self._found(sequence)
        return hits < self._shareable(sequence) and any(
            (group, self._keys(sequence, group, sequence.known)[hits]) in self._computing
            for group in sequence.route.groups
        )

    def admit(self, sequence: Seq) -> bool:
        """Gives a sequence pages for all its known tokens and one more, cached ones first, then those
        copied to the host, and sets how many tokens need no computing. False: not enough pages;
        nothing changed."""
        groups, tokens = sequence.route.groups, sequence.known
        copy = sequence.copy
        found, hits = self._found(sequence)
        count = self._pages_for(len(tokens) + 1)
        for group in groups:
            self.pools[group].share(found[group][:hits])
        if any(self.pools[g].free < count - hits for g in groups):
            for group in groups:
                self.pools[group].give(found[group][:hits])
            return False
        copied = max(self._pages_for(copy.tokens), hits) if copy else hits
        for group in groups:
            sequence.pages[group] = found[group][:hits]
            self._extend(sequence, group, copied, overwritten=True)
            if copy and copied > hits:
                self._store.copy_in(group, sequence.pages[group], copy.parts[group], hits)
            self._extend(sequence, group, count)
        sequence.computed = hits * self._page_size
        if copy:
            sequence.computed = max(sequence.computed, copy.tokens)
            self.remember(sequence, sequence.computed)
            self.drop_copy(sequence)
        else:
            self.hit_tokens += sequence.computed
        for group in groups:
            for key in self._keys(sequence, group, tokens)[sequence.computed // self._page_size :]:
                self._computing.setdefault((group, key), sequence)
        return True

    def copy_bytes(self, sequence: Seq, num_tokens: int) -> int:
        """Bytes of the pages of a sequence's first tokens."""
        pages = self._pages_for(num_tokens)
        return sum(pages * self._page_bytes[g] for g in sequence.route.groups)

    def swap_out(self, sequence: Seq, num_tokens: int) -> bool:
        """Begins to copy the pages of a sequence's first tokens to the host, before it gives them up.
        False: no room; nothing changed."""
        num_bytes = self.copy_bytes(sequence, num_tokens)
        if not num_tokens or not self.host.fits(num_bytes):
            return False
        count = self._pages_for(num_tokens)
        parts = {g: self._store.copy_out(g, p[:count]) for g, p in sequence.pages.items()}
        sequence.copy = Copy(num_tokens, parts, num_bytes)
        self.host.keep(sequence.copy)
        return True

    def drop_copy(self, sequence: Seq) -> None:
        """Forgets what the host holds of a sequence, if anything."""
        if sequence.copy is not None:
            self.host.drop(sequence.copy)
            sequence.copy = None

    def grow(self, sequence: Seq, num_tokens: int) -> bool:
        """Makes sure a sequence has pages for `num_tokens` tokens. False: none free; nothing changed."""
        count = self._pages_for(num_tokens)
        groups = [g for g in sequence.route.groups if len(sequence.pages[g]) < count]
        if any(self.pools[g].free < count - len(sequence.pages[g]) for g in groups):
            return False
        for group in groups:
            self._extend(sequence, group, count)
        return True

    def remember(self, sequence: Seq, num_tokens: int) -> None:
        """Lets the full pages among a sequence's first `num_tokens` tokens, all of them enqueued for
        computing, be found by others."""
        full = num_tokens // self._page_size
        if full <= sequence.remembered:
            return
        tokens = sequence.known[: full * self._page_size]
        for group in sequence.route.groups:
            keys = self._keys(sequence, group, tokens)
            for i in range(sequence.remembered, full):
                self.pools[group].remember(sequence.pages[group][i], keys[i])
                self._computing.pop((group, keys[i]), None)
        sequence.remembered = full

    def release(self, sequence: Seq, poisoned: bool = False) -> None:
        """Gives back all pages. What a poisoned sequence computed is not found again."""
        for group, pages in sequence.pages.items():
            for key in sequence.page_keys.get(group, ()):
                if self._computing.get((group, key)) is sequence:
                    del self._computing[group, key]
            if poisoned:
                self.pools[group].forget(pages)
            self.pools[group].give(pages)
        sequence.pages = {}
        sequence.remembered = 0

    def _shareable(self, sequence: Seq) -> int:
        """How many of its pages a sequence may find instead of computing them."""
        # The last token is always computed, for its logits are wanted; so are those of all tokens of
        # a prompt whose log-probabilities are wanted.
        return 0 if sequence.scores_prompt else (len(sequence.known) - 1) // self._page_size

    def _found(self, sequence: Seq) -> tuple[dict[KvGroup, list[int]], int]:
        """The cached pages of a sequence by group, and how many all groups have."""
        limit, tokens = self._shareable(sequence), sequence.known
        found = {
            group: self.pools[group].match(self._keys(sequence, group, tokens)[:limit])
            for group in sequence.route.groups
        }
        return found, min((len(pages) for pages in found.values()), default=0)

    def _extend(self, sequence: Seq, group: KvGroup, count: int, overwritten: bool = False) -> None:
        """Takes pages up to `count`, zeroed unless the caller overwrites them whole."""
        pages = self.pools[group].take(count - len(sequence.pages[group]))
        if not overwritten:
            self._store.scrub(group, pages)
        sequence.pages[group].extend(pages)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _keys(self, sequence: Seq, group: KvGroup, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the full pages of `tokens`; worked out once a page."""
        keys = sequence.page_keys.setdefault(group, [])
        full = len(tokens) // self._page_size
        if len(keys) < full:
            parent = keys[-1] if keys else self._root(sequence, group)
            begin = len(keys) * self._page_size
            keys.extend(page_keys(parent, tokens[begin:], self._page_size))
        return keys[:full]

    @staticmethod
    def _root(sequence: Seq, group: KvGroup) -> bytes:
        steps, specs = sequence.route.chain.steps, sequence.route.specs
        mine = [
            i
            for i, s in enumerate(specs)
            if isinstance(s, AttentionSpec)
            and (s.num_kv_heads, s.head_dim) == (group.num_kv_heads, group.head_dim)
        ]
        return root_key(steps[: mine[-1] + 1], sequence.request.cache_salt)
