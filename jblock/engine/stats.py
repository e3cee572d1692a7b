"""Counters and gauges for other threads: a snapshot that the loop's thread makes on a clock."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from jblock.engine.api import EngineStats, Output, TenantStats
from jblock.engine.graph.graph import ServingGraph
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Counters
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.weights.loader import Loads
from jblock.pallas_kernels import backends

# A snapshot takes 30 us; a scrape or a heartbeat needs none that is younger.
_SECONDS = 0.05


class StatsSnapshot:
    """What the loop's parts say, read on the loop's thread alone, for no part is locked.

    Attributes:
      latest: the last one made. Whoever has seen a request's last output finds that request in it.
    """

    def __init__(self, collect: Callable[[], EngineStats]):
        """`collect` is called on the thread that calls `take`."""
        self._collect = collect
        self._taken = 0.0
        self.latest = EngineStats()
        self.take((), idle=True)

    def take(self, outputs: Sequence[Output], *, idle: bool) -> None:
        """Makes a new one if a request ended, the loop is about to rest, or its time has come.

        Args:
          outputs: what the last step brought, before anybody else has it.
          idle: nothing is left to do.
        """
        now = time.monotonic()
        if idle or now - self._taken >= _SECONDS or any(o.finish_reason for o in outputs):
            self._taken = now
            self.latest = self._collect()

    def with_background(self, compiles: int, hung_reads: int) -> EngineStats:
        """The latest, with what goes on while the loop rests: programs compiled, and reads given up."""
        return dataclasses.replace(
            self.latest, compiles_in_background=compiles, hung_reads=hung_reads
        )


def collect_stats(
    device: Runner,
    sequences: Scheduler,
    ran: Counters,
    loads: Loads,
    graph: ServingGraph,
    generated_tokens: int,
) -> EngineStats:
    """What the parts of a loop say, on the thread that owns them."""
    executables, kv, weight_cache = device.executables, sequences.kv, loads.weight_cache
    counts = weight_cache.counts
    kv_pools = [pool for shape, pool in kv.pools.items() if isinstance(shape, KVShape)]
    return EngineStats(
        steps=ran.steps,
        block_calls=ran.block_calls,
        block_rows=ran.block_rows,
        model_calls=ran.model_calls,
        model_rows=ran.model_rows,
        compiles_on_serving_path=executables.compiles_on_serving_path,
        compiles_in_background=executables.compiles_in_background,
        running=len(sequences.running),
        waiting=len(sequences.waiting),
        pages_free=sum(p.num_free for p in kv_pools),
        pages_total=sum(p.total for p in kv_pools),
        rows_free=sequences.rows.num_free,
        rows_total=sequences.rows.total,
        resident_bytes=weight_cache.weight_bytes + graph.table_bytes,
        chains=len(graph.routes),
        chains_resident=weight_cache.resident_chains,
        adapters_resident=weight_cache.adapters,
        host_bytes=loads.cache.bytes,
        residency_hits=counts.hits,
        residency_misses=counts.misses,
        host_hits=loads.cache.hits,
        host_misses=loads.cache.misses,
        loads=counts.loads,
        load_failures=counts.failures,
        evictions=counts.evictions,
        prompt_tokens=ran.prompt_tokens,
        cached_tokens=kv.hit_tokens,
        preemptions=sequences.preemptions,
        swaps=sequences.offloads,
        host_kv_bytes=kv.host.used,
        generated_tokens=generated_tokens,
        kernels_replaced=len(backends.replaced()),
        tenants=tuple(
            TenantStats(tenant=name, waiting=waiting, running=running, served_seconds=seconds)
            for name, waiting, running, seconds in sequences.counter.snapshot()
        ),
    )
