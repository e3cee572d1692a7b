"""Files that are read again when they change, while the server runs."""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence

from absl import logging

_LOOK_SECONDS = 1.0


class ReloadedFiles:
    """Files that belong together. What was read of them last holds until they can be read again, whole.

    Attributes:
      field: the flag that names them.
      reloads: how often they were read again and taken.
      refusals: how often they were read again and could not be used.
    """

    def __init__(self, field: str, paths: Sequence[str], read: Callable[[], None]):
        """Reads them.

        Args:
          field: the flag that names them.
          paths: where they are.
          read: takes what is in them, all or, by ValueError or OSError, nothing.

        Raises:
          ValueError, OSError: they cannot be used.
        """
        self.field = field
        self.reloads = self.refusals = 0
        self._paths, self._read = paths, read
        self._seen = self._look()
        read()

    def refresh(self) -> None:
        """Reads them if one is another file than before, or was written."""
        now = self._look()
        if now == self._seen:
            return
        self._seen = now
        try:
            self._read()
        except (ValueError, OSError) as error:
            self.refusals += 1
            logging.error("%s (%s stays as it was)", error, self.field)
        else:
            self.reloads += 1
            logging.info("%s: was read again", self.field)

    def _look(self) -> list[tuple[int, ...]]:
        return [_signature(path) for path in self._paths]


async def keep_fresh(files: Iterable[ReloadedFiles]) -> None:
    """Looks after files for as long as the server runs."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for one in files:
            await asyncio.to_thread(one.refresh)


def _signature(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode
