"""Counters and gauges for other threads: a snapshot that the loop's thread makes on a clock."""

import collections
import dataclasses
import heapq
import time
from collections.abc import Callable, Mapping, Sequence

from jblock.engine.api import BlockStats, EngineStats, Output, TenantStats
from jblock.engine.graph.graph import BlockInstance, Route, ServingGraph
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import BlockQueue, BlockQueues, Counters
from jblock.engine.scheduling import step_budget
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.speculation.speculation import Speculation
from jblock.engine.stats_records import joined_blocks
from jblock.engine.weights.loader import Loads
from jblock.engine.weights.residents import Weights
from jblock.pallas_kernels import backends

# A snapshot takes 30 us; a scrape or a heartbeat needs none that is younger.
_SECONDS = 0.05
# Those of blocks are made less often, and of so many blocks at most.
_BLOCK_SECONDS = 1.0
_MOST_BLOCKS = 64


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
    blocks: tuple[BlockStats, ...],
    loads: Loads,
    graph: ServingGraph,
    generated_tokens: int,
    speculation: Speculation | None,
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
        adapter_slots=weight_cache.adapter_slots,
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
        kv_offloads=sequences.offloads,
        host_kv_bytes=kv.host.used,
        generated_tokens=generated_tokens,
        drafted_tokens=speculation.drafted if speculation else 0,
        accepted_tokens=speculation.accepted if speculation else 0,
        kernels_replaced=len(backends.replaced()),
        tenants=tuple(
            TenantStats(tenant=name, waiting=waiting, running=running, served_seconds=seconds)
            for name, waiting, running, seconds in sequences.counter.snapshot()
        ),
        blocks=blocks,
    )


class BlockTable:
    """What each block does; made anew on a clock, on the thread that runs them."""

    def __init__(self) -> None:
        self._taken = 0.0
        self._latest: tuple[BlockStats, ...] = ()
        self._bytes: dict[BlockInstance, int] = {}

    def of(
        self, queues: BlockQueues, sequences: Scheduler, graph: ServingGraph
    ) -> tuple[BlockStats, ...]:
        """The busiest blocks by rows, and all others as one."""
        now, idle = time.monotonic(), not sequences.running and not len(sequences.waiting)
        if idle or now - self._taken >= _BLOCK_SECONDS:
            self._taken = now
            found = list(queues)
            busiest = heapq.nlargest(_MOST_BLOCKS, found, key=lambda one: one[1].rows)
            kv_bytes = _kv_bytes(sequences)
            self._bytes = {i: self._bytes.get(i) or _weight_bytes(i) for i, _ in found}
            blocks = [self._stats(i, q, graph, kv_bytes) for i, q in busiest]
            if len(found) > len(busiest):
                told = {i for i, _ in busiest}
                rest = [(i, q) for i, q in found if i not in told]
                blocks.append(self._other(rest, graph, kv_bytes))
            self._latest = joined_blocks(blocks)
        return self._latest

    def _stats(
        self,
        instance: BlockInstance,
        queue: BlockQueue,
        graph: ServingGraph,
        kv_bytes: Mapping[BlockInstance, int],
    ) -> BlockStats:
        return BlockStats(
            block=instance.name,
            kind=instance.kind,
            models=graph.users.get(instance, 0),
            weight_bytes=self._bytes[instance],
            resident_bytes=_resident_bytes(instance),
            batches=queue.batches,
            rows=queue.rows,
            seconds=queue.seconds,
            queue_rows=queue.waiting_rows,
            batch_limit=0 if queue.limit == step_budget.NO_LIMIT else queue.limit,
            kv_bytes=kv_bytes.get(instance, 0),
        )

    def _other(
        self,
        rest: Sequence[tuple[BlockInstance, BlockQueue]],
        graph: ServingGraph,
        kv_bytes: Mapping[BlockInstance, int],
    ) -> BlockStats:
        queues = [queue for _, queue in rest]
        return BlockStats(
            block="other",
            models=max(graph.users.get(i, 0) for i, _ in rest),
            weight_bytes=sum(self._bytes[i] for i, _ in rest),
            resident_bytes=sum(_resident_bytes(i) for i, _ in rest),
            batches=sum(q.batches for q in queues),
            rows=sum(q.rows for q in queues),
            seconds=sum(q.seconds for q in queues),
            queue_rows=sum(q.waiting_rows for q in queues if not q.empty),
            kv_bytes=sum(kv_bytes.get(i, 0) for i, _ in rest),
        )


def _weight_bytes(instance: BlockInstance) -> int:
    weights = {id(w): w for layer in instance.layers for w in layer.weights}
    return sum(w.size for w in weights.values())


def _resident_bytes(instance: BlockInstance) -> int:
    weights = {id(w): w for layer in instance.layers for w in layer.weights}
    absent = [w for w in weights.values() if isinstance(w, Weights) and not w.tensors]
    return sum(w.size for w in weights.values()) - sum(w.size for w in absent)


def _kv_bytes(sequences: Scheduler) -> Mapping[BlockInstance, int]:
    """Bytes of the pages that sequences hold, by block; what several share counts for each."""
    pages: collections.Counter[Route] = collections.Counter()
    for sequence in sequences.running.values():
        pages[sequence.route] += sequence.pages.count
    found: collections.Counter[BlockInstance] = collections.Counter()
    for route, count in pages.items():
        for instance in route.instances:
            for segment in instance.segments:
                if segment.kv_shape is not None and count:
                    each = sequences.kv.page_bytes[segment.kv_shape]
                    found[instance] += count * segment.kv_layers * each
    return found
