"""Whether the loop still goes round: a device call that never returns must not leave clients waiting."""

import contextlib
import time
from collections.abc import Iterator


class Watch:
    """Seconds since the loop last waited for work, as far as this process ran in them.

    The loop goes through `rest` in every round; somebody else looks, at least once a second. Between two
    looks at most a second counts: a process that was paused, or a machine that slept, is not stuck.
    """

    _MOST = 1.0

    def __init__(self) -> None:
        self._rounds = self._seen = 0
        self._resting = True
        self._seconds = 0.0
        self._looked = time.monotonic()

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """Around waiting for work, for whatever time."""
        self._resting = True
        try:
            yield
        finally:
            self._rounds += 1
            self._resting = False

    def seconds(self) -> float:
        """Of the present round; 0 while the loop rests."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, self._MOST), now
        if self._resting or self._rounds != self._seen:
            self._seen, self._seconds = self._rounds, 0.0
        else:
            self._seconds += passed
        return self._seconds
