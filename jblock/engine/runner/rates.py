"""How fast this machine is: rates of copies and prefill, and how much slower steps are than their profile."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jblock.engine.graph.graph import ServingGraph
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.programs.page_ops import COPY_PAGES
from jblock.engine.runner.batch import Batch
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Step


class Pace:
    """How much longer steps take than their profile says: cached tokens to attend to, other work on
    the machine, and calls that are cheaper together.

    Attributes:
      ratio: seconds passed over seconds expected, lately.
    """

    _SLOWEST, _FASTEST = 8.0, 0.25
    _WEIGHT = 0.1

    def __init__(self) -> None:
        self.ratio = 1.0
        self._ready: float | None = None

    def note(self, step: Step) -> None:
        """Learns from a step whose tokens were read a moment ago."""
        now = time.perf_counter()
        if step.sampled and step.seconds and self._ready is not None:
            # Steps follow each other on the device, so one takes from the last one's end to its own.
            seconds = now - max(self._ready, step.enqueued)
            ratio = min(max(seconds / step.seconds, self._FASTEST), self._SLOWEST)
            self.ratio += self._WEIGHT * (ratio - self.ratio)
        # A step without tokens ends unnoticed, and the next one bears its time.
        self._ready = now if step.sampled else None


def measure_rates(runner: Runner, graph: ServingGraph) -> Rates:
    """Times copies of pages nobody owns yet, and a chunk of prefill without real rows: its matmuls
    are the same. For an idle agent at its start."""
    shape, pool = max(runner.pool_shapes.items(), key=lambda kv: kv[1].page_bytes)
    pages = list(range(1, pool.num_pages))[:COPY_PAGES]
    out = _seconds(lambda: jax.tree.map(np.asarray, runner.state.copy_out(shape, pages)))
    copies = jax.tree.map(np.asarray, runner.state.copy_out(shape, pages))

    def copy_in() -> None:
        runner.state.copy_in(shape, pages, copies)
        runner.wait()

    chunk = max(runner.config.first_buckets, key=lambda b: b.q_len)
    # Where weights are bounded, some are not there.
    loaded = [r for r in graph.routes.values() if all(w.tensors for w in r.weights.members)]
    route = max(loaded, key=lambda r: len(r.needs.parts))

    def prefill() -> None:
        runner.begin_step()
        for instance in route.instances:
            runner.run(instance, Batch(chunk, ()), {})
        runner.wait()

    slower = max(out, _seconds(copy_in))
    tokens = chunk.num_seqs * chunk.q_len
    rates = Rates(
        copy_bytes=len(pages) * pool.page_bytes / slower,
        prefill_tokens=tokens / _seconds(prefill),
    )
    runner.begin_step()
    return rates


def _seconds(call: Callable[[], Any]) -> float:
    """Of the better of two calls: the first one also touches memory for the first time."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-9)
