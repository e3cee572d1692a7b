"""Who owns which KV page and register row. Pure Python; the arrays live elsewhere."""

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """More was asked for than is free; the caller waits or refuses."""


class Allocator:
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
