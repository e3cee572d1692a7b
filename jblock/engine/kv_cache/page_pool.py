"""Which ids are free: register rows, slots, and KV pages. Pure Python; the arrays live elsewhere."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np


class OutOfPages(RuntimeError):
    """More was asked for than is free; the caller waits or refuses."""


class IdAllocator:
    """Hands out the ids `first .. first + count - 1`, each to one owner at a time.

    Freed ids are handed out again last-freed first, which keeps the touched memory small.
    """

    def __init__(self, count: int, first: int = 0):
        """Raises ValueError for a negative count."""
        if count < 0:
            raise ValueError(f"count is {count}; give 0 or more")
        self.total = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Number of free ids."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` ids, or none at all.

        Raises:
          OutOfPages: fewer than count are free.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} wanted, {len(self._free)} of {self.total} free")
        ids = [self._free.pop() for _ in range(count)]
        self._used.update(ids)
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Takes ids back.

        Raises:
          ValueError: an id that is not allocated, such as one freed twice; nothing is taken back.
        """
        ids = list(ids)
        wrong = [i for i in ids if i not in self._used]
        if wrong or len(set(ids)) != len(ids):
            raise ValueError(f"ids {wrong or ids} are not allocated, or named twice")
        self._used.difference_update(ids)
        self._free.extend(reversed(ids))


class PagePool:
    """The pages of one KV shape: counted owners, and a cache of pages by content.

    A page whose content has a key (prefix_keys.py) stays cached after its last owner is gone, until its
    space is wanted; the page unused longest goes first.
    """

    def __init__(self, count: int):
        """Pages 1 to `count`; page 0 is the null page, which belongs to nobody.

        Raises:
          ValueError: a negative count.
        """
        if count < 0:
            raise ValueError(f"count is {count}; give 0 or more")
        self._clear(count)

    def _clear(self, count: int) -> None:
        self.total = count
        self._free = list(range(count, 0, -1))
        self._owners = np.zeros(count + 1, np.int32)
        # tokens' hash -> layer's digest -> page, and the way back.
        self._pages_of: dict[bytes, dict[bytes, int]] = {}
        self._key_of: dict[int, tuple[bytes, bytes]] = {}
        self._unowned: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages without an owner, cached ones included: what `allocate` can hand out."""
        return len(self._free) + len(self._unowned)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each, or none at all. Cached pages are evicted for it last.

        Raises:
          OutOfPages: fewer than count have no owner.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages wanted, {self.num_free} of {self.total} free")
        while len(self._free) < count:
            page, _ = self._unowned.popitem(last=False)
            self._uncache(page)
            self._free.append(page)
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        pages.reverse()
        self._owners[pages] = 1
        return pages

    def lookup(self, tokens: bytes, digests: Sequence[bytes]) -> list[int] | None:
        """The pages of these tokens in some layers; None where one is missing. Adds no owner.

        Args:
          tokens: hash of the tokens up to the page's end.
          digests: of the layers.
        """
        by_layer = self._pages_of.get(tokens)
        if by_layer is None:
            return None
        try:
            return [by_layer[digest] for digest in digests]
        except KeyError:
            return None

    def add_owner(self, pages: Sequence[int]) -> None:
        """Adds an owner to each of some pages that `lookup` just found."""
        for page in pages:
            self._unowned.pop(page, None)
        self._owners[pages] += 1

    def cache(self, tokens: bytes, digests: Sequence[bytes], pages: Sequence[int]) -> None:
        """Lets owned pages be found by content. A key that has a page already keeps it, and so does a
        page that has a key."""
        by_layer = self._pages_of.setdefault(tokens, {})
        for digest, page in zip(digests, pages, strict=True):
            if page not in self._key_of and digest not in by_layer:
                by_layer[digest] = page
                self._key_of[page] = (tokens, digest)

    def invalidate(self, tokens: bytes, digests: Sequence[bytes]) -> None:
        """Stops pages from being found, because what they hold is not what their key says."""
        by_layer = self._pages_of.get(tokens, {})
        for page in [by_layer[d] for d in digests if d in by_layer]:
            self._uncache(page)
            if page in self._unowned:
                del self._unowned[page]
                self._free.append(page)

    def free(self, pages: Sequence[int]) -> None:
        """Takes one owner off each page.

        Raises:
          ValueError: a page without an owner, or one named twice; nothing is taken back.
        """
        if not len(pages):
            return
        owners = self._owners[pages]
        if not owners.all() or len(set(pages)) != len(pages):
            wrong = [p for p, n in zip(pages, owners, strict=True) if not n]
            raise ValueError(f"pages {wrong or pages} are not owned, or named twice")
        self._owners[pages] -= 1
        for page, count in zip(reversed(pages), owners[::-1], strict=True):
            if count == 1:
                if page in self._key_of:
                    self._unowned[page] = None
                else:
                    self._free.append(page)

    def resize(self, count: int, max_cached: int) -> np.ndarray:
        """Changes the number of pages. Pages with an owner are kept, and cached ones as far as there is
        room, those unused longest first to go.

        Args:
          count: pages from now on.
          max_cached: most cached pages without an owner that are kept.

        Returns:
          int32 [old count + 1]: the new id of each page that is kept, 0 of the others.

        Raises:
          OutOfPages: more pages than `count` have an owner; nothing changed.
        """
        owned = np.flatnonzero(self._owners)
        if len(owned) > count:
            raise OutOfPages(f"{len(owned)} pages have an owner, {count} are to be left")
        room = min(count - len(owned), max_cached, len(self._unowned))
        cached = list(self._unowned)[len(self._unowned) - room :]
        kept = [*owned.tolist(), *cached]
        new_id = np.zeros(self.total + 1, np.int32)
        stay = [page for page in kept if page <= count]
        new_id[stay] = stay
        others = iter(sorted(set(range(1, count + 1)).difference(stay)))
        for page in kept:
            if page > count:
                new_id[page] = next(others)
        owners, keys = self._owners[owned], self._key_of
        self._clear(count)
        self._owners[new_id[owned]] = owners
        taken = set(new_id[kept].tolist())
        self._free = [page for page in self._free if page not in taken]
        for page in filter(new_id.__getitem__, keys):
            tokens, digest = keys[page]
            self.cache(tokens, [digest], [int(new_id[page])])
        self._unowned.update((int(new_id[page]), None) for page in cached)
        return new_id

    def _uncache(self, page: int) -> None:
        tokens, digest = self._key_of.pop(page)
        by_layer = self._pages_of[tokens]
        del by_layer[digest]
        if not by_layer:
            del self._pages_of[tokens]
