"""Preemption by swap: copies of a sequence's pages in bounded host memory, and when they pay.

A sequence that gives way can be computed anew, or its pages can be copied to the host and back. The
copies are enqueued like any other work and arrive behind the steps that run; nothing waits for them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jblock.engine.runner.batch import Batch

if TYPE_CHECKING:
    from jblock.engine.graph.graph import KvGroup, ServingGraph
    from jblock.engine.runner.runner import Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does, as measured at the start.

    Attributes:
      copy_bytes: bytes/s of pages, one way, the slower one.
      prefill_tokens: tokens/s of a prompt through the longest chain.
    """

    copy_bytes: float
    prefill_tokens: float

    def swap_pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether copying `num_bytes` out and back takes less time than computing `num_tokens` anew.
        What the prefix cache may still hold of them by then is not known, and not counted."""
        return 2 * num_bytes / self.copy_bytes < num_tokens / self.prefill_tokens


@dataclasses.dataclass(eq=False)
class Copy:
    """Pages of a waiting sequence, in the order it had them.

    Attributes:
      tokens: how many of its first tokens they hold.
      parts: by KV group, what `Runner.copy_out` returned; on the host once landed.
      num_bytes: of the pages.
    """

    tokens: int
    parts: dict["KvGroup", Sequence[Any]]
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
        self._transit: tuple[list[Copy], list[Copy]] = ([], [])

    def fits(self, num_bytes: int) -> bool:
        """Whether a copy of this size may begin."""
        in_transit = sum(c.num_bytes for copies in self._transit for c in copies)
        return (
            self.used + num_bytes <= self.total and in_transit + num_bytes <= self._most_in_transit
        )

    def keep(self, copy: Copy) -> None:
        """Takes in a copy that `fits` and is on its way."""
        self.used += copy.num_bytes
        self._transit[1].append(copy)

    def drop(self, copy: Copy) -> None:
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


def measure(device: "Runner", graph: "ServingGraph") -> Rates:
    """Times copies of pages nobody owns yet, and a chunk of prefill without real rows: its matmuls
    are the same. For an idle agent at its start."""
    group, shape = max(device.pool_shapes.items(), key=lambda kv: kv[1].page_bytes)
    pages = list(range(1, shape.num_pages))[:4]
    out = _seconds(lambda: jax.tree.map(np.asarray, device.copy_out(group, pages)))
    copies = jax.tree.map(np.asarray, device.copy_out(group, pages))

    def copy_in() -> None:
        device.copy_in(group, pages, copies)
        device.wait()

    chunk = max(device.config.first_buckets, key=lambda b: b.q_len)
    # Where weights are bounded, some are not there.
    loaded = [r for r in graph.routes.values() if all(w.tensors for w in r.weights.members)]
    route = max(loaded, key=lambda r: len(r.specs))

    def prefill() -> None:
        device.begin_step()
        for instance in route.instances:
            device.run(instance, Batch(chunk, ()))
        device.wait()

    slower = max(out, _seconds(copy_in))
    tokens = chunk.num_seqs * chunk.q_len
    rates = Rates(
        copy_bytes=len(pages) * shape.page_bytes / slower,
        prefill_tokens=tokens / _seconds(prefill),
    )
    device.begin_step()
    return rates


def _seconds(call: Callable[[], Any]) -> float:
    """Of the better of two calls: the first one also touches memory for the first time."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-9)
