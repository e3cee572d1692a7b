"""Records of what an engine counts and measures: plain data that crosses its boundary (`api.py`)."""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class TenantStats:
    """What one tenant has of an engine.

    Attributes:
      tenant: its name.
      waiting: requests queued, not running.
      running: sequences in flight.
      served_seconds: device time it was charged for, by the profile.
    """

    tenant: str
    waiting: int = 0
    running: int = 0
    served_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStats:
    """What one block does. Of many the busiest are told, and all others together as the block "other".

    Attributes:
      block: its name, by kind and first component; stable as long as the block is served.
      kind: "embedding", "layer", "stitch" or "head"; "" of "other".
      models: chains that pass it; of "other" the most of any.
      weight_bytes: parameters of it, on the device or not; what is tied counts where its owner is.
      resident_bytes: of those, what is on the device.
      batches: batches that it ran.
      rows: rows (tokens) of those, padding not counted.
      seconds: device time that they should have taken, by the profile.
      queue_rows: rows that wait for it, left by the last step.
      batch_limit: rows that it decodes in a step at most; 0: no limit.
      kv_bytes: KV pages of its layers that sequences own.
    """

    block: str
    kind: str = ""
    models: int = 0
    weight_bytes: int = 0
    resident_bytes: int = 0
    batches: int = 0
    rows: int = 0
    seconds: float = 0.0
    queue_rows: int = 0
    batch_limit: int = 0
    kv_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since start and gauges of now.

    Attributes:
      steps: forward steps run.
      block_calls: executions of a block, embeddings and heads included.
      block_rows: rows (tokens) those carried, padding not counted.
      model_calls: batches a server of one model each would have run for the same work.
      model_rows: rows (tokens) those would have carried.
      compiles_on_serving_path: programs compiled while a request waited (promise: 0).
      compiles_in_background: programs compiled at warm-up or in the background.
      running: sequences in flight.
      waiting: requests queued, not yet started.
      pages_free: KV pages no sequence owns, over all groups; cached prefixes may lie in them.
      pages_total: KV pages over all groups.
      rows_free: free register rows.
      rows_total: register rows.
      resident_bytes: bytes of parameters and slot tables on the device.
      chains: chains that may be asked for.
      chains_resident: those that a request would find on the device.
      adapters_resident: adapters with a slot.
      adapter_slots: adapters that may have one at a time.
      host_bytes: prepared adapters and parameters in the host's cache.
      residency_hits: requests that found their chain on the device.
      residency_misses: requests that had to wait for it.
      host_hits: loads that found what they needed in the host's cache.
      host_misses: loads that read it from the zoo.
      loads: adapters and components brought to the device.
      load_failures: those that could not be.
      evictions: adapters and components that left the device.
      prompt_tokens: prompt tokens computed.
      cached_tokens: prompt tokens found in the prefix cache instead.
      preemptions: sequences that gave their pages up to an older one and were resumed later.
      kv_offloads: how many of them by copies of their pages on the host; the others were computed anew.
      host_kv_bytes: host memory those copies take now.
      generated_tokens: tokens generated.
      drafted_tokens: tokens that were drafted and verified.
      accepted_tokens: those of them that came true.
      hung_reads: reads of adapters and parameters that took longer than the limit and were given up.
      restarts: engine processes that died or froze and were replaced.
      resumed_requests: requests that went on in a new process after their tokens so far.
      suspects: requests that a process died under and that have not gone on since.
      kernels_replaced: ops whose kernel failed its self-test at start, served by XLA instead (promise: 0).
      tenants: what each has of it.
      blocks: what each does, about a second old.
    """

    steps: int = 0
    block_calls: int = 0
    block_rows: int = 0
    model_calls: int = 0
    model_rows: int = 0
    compiles_on_serving_path: int = 0
    compiles_in_background: int = 0
    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    pages_total: int = 0
    rows_free: int = 0
    rows_total: int = 0
    resident_bytes: int = 0
    chains: int = 0
    chains_resident: int = 0
    adapters_resident: int = 0
    adapter_slots: int = 0
    host_bytes: int = 0
    residency_hits: int = 0
    residency_misses: int = 0
    host_hits: int = 0
    host_misses: int = 0
    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kv_offloads: int = 0
    host_kv_bytes: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    hung_reads: int = 0
    restarts: int = 0
    resumed_requests: int = 0
    suspects: int = 0
    kernels_replaced: int = 0
    tenants: tuple[TenantStats, ...] = ()
    blocks: tuple[BlockStats, ...] = ()


# Fields of EngineStats that say how things are now; the others only grow.
GAUGES = frozenset(
    {
        "running",
        "waiting",
        "pages_free",
        "pages_total",
        "rows_free",
        "rows_total",
        "resident_bytes",
        "chains",
        "chains_resident",
        "adapters_resident",
        "adapter_slots",
        "host_bytes",
        "host_kv_bytes",
        "suspects",
        "kernels_replaced",
        "tenants",
        "blocks",
    }
)


def total(several: Sequence[EngineStats]) -> EngineStats:
    """Counters and gauges of engines that serve one zoo together. What all have alike is not added up."""
    alike = ("chains", "kernels_replaced")
    tenants: dict[str, TenantStats] = {}
    for one in (tenant for stats in several for tenant in stats.tenants):
        so_far = tenants.get(one.tenant, TenantStats(tenant=one.tenant))
        tenants[one.tenant] = TenantStats(
            tenant=one.tenant,
            waiting=so_far.waiting + one.waiting,
            running=so_far.running + one.running,
            served_seconds=so_far.served_seconds + one.served_seconds,
        )
    numbers = {
        f.name: (max if f.name in alike else sum)(getattr(s, f.name) for s in several)
        for f in dataclasses.fields(EngineStats)
        if f.name not in ("tenants", "blocks")
    }
    blocks = joined_blocks(block for stats in several for block in stats.blocks)
    return EngineStats(**numbers, tenants=tuple(tenants.values()), blocks=blocks)


def joined_blocks(blocks: Iterable[BlockStats]) -> tuple[BlockStats, ...]:
    """One record a name; numbers are added up but `models`, of which the most is told."""
    found: dict[str, BlockStats] = {}
    for one in blocks:
        before = found.get(one.block)
        if before is None:
            found[one.block] = one
            continue
        sums = {name: getattr(before, name) + getattr(one, name) for name in _ADDED}
        found[one.block] = dataclasses.replace(
            before, models=max(before.models, one.models), **sums
        )
    return tuple(found.values())


_ADDED = (
    "weight_bytes",
    "resident_bytes",
    "batches",
    "rows",
    "seconds",
    "queue_rows",
    "batch_limit",
    "kv_bytes",
)
