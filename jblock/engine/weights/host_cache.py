"""The host's tier: arrays as they go to the device."""

import collections
import threading
from collections.abc import Hashable
from typing import Any


class HostCache:
    """Prepared arrays in host memory, so that what comes back is not read again; the unused longest
    leave. Thread-safe.

    Attributes:
      hits: entries that were found.
      misses: entries that were not.
      bytes: what all entries hold.
    """

    def __init__(self, max_bytes: int):
        self.hits = self.misses = self.bytes = 0
        self._max_bytes = max_bytes
        self._entries: collections.OrderedDict[Hashable, tuple[Any, int]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """What was put under a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        """Keeps a value for as long as there is room; one larger than all room is not kept."""
        with self._lock:
            if nbytes > self._max_bytes or key in self._entries:
                return
            self._entries[key] = (value, nbytes)
            self.bytes += nbytes
            while self.bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed
