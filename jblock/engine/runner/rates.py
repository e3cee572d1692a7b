"""How fast this machine copies pages and computes prompts."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jblock.engine.graph.graph import ServingGraph
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.programs.page_ops import COPY_PAGES
from jblock.engine.runner.batch import Batch
from jblock.engine.runner.runner import Runner


def measure_rates(runner: Runner, graph: ServingGraph) -> Rates:
    """Times copies of pages nobody owns yet, and a chunk of prefill without real rows: its matmuls
    are the same. For an idle agent at its start."""
    pools = {s: pool for s, pool in runner.pool_shapes.items() if isinstance(s, KVShape)}
    shape, pool = max(pools.items(), key=lambda kv: kv[1].page_bytes)
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
            runner.run(instance, Batch(chunk, ()), None)
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
