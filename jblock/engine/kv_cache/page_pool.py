"""Who owns which KV page and register row. Pure Python; the arrays live elsewhere."""

import collections
from collections.abc import Iterable


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
    def free(self) -> int:
        """How many ids nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` ids, or none at all.

        Raises:
          OutOfPages: fewer than count are free.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} wanted, {len(self._free)} of {self.total} free")
        ids = [self._free.pop() for _ in range(count)]
        self._used.update(ids)
        return ids

    def give(self, ids: Iterable[int]) -> None:
        """Takes ids back.

        Raises:
          ValueError: an id that is not out, such as one given back twice; nothing is taken back.
        """
        ids = list(ids)
        wrong = [i for i in ids if i not in self._used]
        if wrong or len(set(ids)) != len(ids):
            raise ValueError(f"ids {wrong or ids} are not owned by anyone, or named twice")
        self._used.difference_update(ids)
        self._free.extend(reversed(ids))


class PagePool:
    """The KV pages of one group: counted owners, and a cache of pages by their content.

    A page whose contents can be named (a key over everything that decided them) stays in the cache
    after its last owner is gone, until the space is wanted; the page unused longest goes first.
    """

    def __init__(self, count: int, first: int = 0):
        """Raises ValueError for a negative count."""
        if count < 0:
            raise ValueError(f"count is {count}; give 0 or more")
        self.total = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._owners: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unowned: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """Pages nobody owns, cached ones included: what `take` can hand out."""
        return len(self._free) + len(self._unowned)

    def take(self, count: int) -> list[int]:
        """`count` pages with one owner each, or none at all. Cached pages are forgotten for it last.

        Raises:
          OutOfPages: fewer than count have no owner.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages wanted, {self.free} of {self.total} free")
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._unowned.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            pages.append(self._free.pop())
        self._owners.update(dict.fromkeys(pages, 1))
        return pages

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages cached under the leading keys, up to the first miss; nobody's owner changes."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to each of some pages that `match` just found."""
        for page in pages:
            self._unowned.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1

    def remember(self, page: int, key: bytes) -> None:
        """Lets an owned page be found by content. A key that has a page already keeps it."""
        if page not in self._key_of and key not in self._page_of:
            self._key_of[page], self._page_of[key] = key, page

    def forget(self, pages: Iterable[int]) -> None:
        """Stops pages from being found, because what they hold is not what their key says."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
                if page in self._unowned:
                    del self._unowned[page]
                    self._free.append(page)

    def give(self, pages: Iterable[int]) -> None:
        """Takes one owner off each page.

        Raises:
          ValueError: a page nobody owns, or one named twice; nothing is taken back.
        """
        pages = list(pages)
        wrong = [p for p in pages if p not in self._owners]
        if wrong or len(set(pages)) != len(pages):
            raise ValueError(f"pages {wrong or pages} are not owned by anyone, or named twice")
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                if page in self._key_of:
                    self._unowned[page] = None
                else:
                    self._free.append(page)
