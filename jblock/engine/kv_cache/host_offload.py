"""Copies of preempted sequences' pages in bounded host memory, and when they pay.

A preempted sequence can be computed anew, or its pages can be copied to the host and back. The copies
are enqueued like any other work and arrive behind the steps that run; nothing waits for them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jblock.engine.kv_cache.spec import KVShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does, as measured at the start.

    Attributes:
      copy_bytes: bytes/s of pages, one way, the slower one.
      prefill_tokens: tokens/s of a prompt through the longest chain.
    """

    copy_bytes: float
    prefill_tokens: float

    def offload_pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether copying `num_bytes` out and back takes less time than computing `num_tokens` anew.
        What the prefix cache may still hold of them by then is not known, and not counted."""
        return 2 * num_bytes / self.copy_bytes < num_tokens / self.prefill_tokens


@dataclasses.dataclass(eq=False)
class HostCopy:
    """Pages of a waiting sequence, in the order it had them.

    Attributes:
      tokens: how many of its first tokens they hold.
      parts: by KV shape, what `Runner.copy_out` returned; on the host once landed.
      num_bytes: of the pages.
    """

    tokens: int
    parts: dict[KVShape, Sequence[Any]]
    num_bytes: int


class HostPool:
    """Host memory for copies, bounded; a copy belongs to one sequence and is never handed to another.

    Attributes:
      total: bytes.
      used: bytes of the copies held, those on their way included.
    """

    def __init__(self, total: int, most_in_transit: int):
        """Raises ValueError for negative sizes.

        Args:
          total: bytes.
          most_in_transit: bytes of copies that may be on their way at once: until they landed they
            take memory of the device.
        """
        if total < 0 or most_in_transit < 0:
            raise ValueError(f"{total} and {most_in_transit} bytes given; give 0 or more")
        self.total, self.used = total, 0
        self._most_in_transit = most_in_transit
        # Those a step has passed since; those enqueued since.
        self._transit: tuple[list[HostCopy], list[HostCopy]] = ([], [])

    def fits(self, num_bytes: int) -> bool:
        """Whether a copy of this size may begin."""
        in_transit = sum(c.num_bytes for copies in self._transit for c in copies)
        return (
            self.used + num_bytes <= self.total and in_transit + num_bytes <= self._most_in_transit
        )

    def keep(self, copy: HostCopy) -> None:
        """Takes in a copy that `fits` and is on its way."""
        self.used += copy.num_bytes
        self._transit[1].append(copy)

    def drop(self, copy: HostCopy) -> None:
        """Forgets a copy."""
        self.used -= copy.num_bytes
        for copies in self._transit:
            if copy in copies:
                copies.remove(copy)

    def land(self) -> None:
        """Called once a step, after its tokens were read: what was enqueued before it began is there,
        so taking it costs no wait."""
        arrived, recent = self._transit
        for copy in arrived:
            copy.parts = {g: jax.tree.map(np.asarray, p) for g, p in copy.parts.items()}
        self._transit = (recent, [])
