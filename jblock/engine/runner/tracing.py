"""Names in a profiler's trace: steps, the loop's phases, and what a batch holds.

An XLA profiler session shows the loop's phases and blocks from here, and under them every program by its own
name (`ProgramKey.name`), inside which `jax.named_scope`s name the parts. Without a session nothing of a
batch's description is made.
"""

import collections
import contextlib
import hashlib

from jax.profiler import TraceAnnotation

from jblock.engine.runner.batch import Batch

# Steps, and what the loop does in one.
STEP = "step"
PHASES = ("load", "admit", "schedule", STEP, "read_tokens")

# Whether anybody traces: C++ code, which takes no time.
enabled = TraceAnnotation.is_enabled
NOTHING = contextlib.nullcontext()


def block(name: str, batch: Batch) -> contextlib.AbstractContextManager:
    """An annotation around what is enqueued for a batch in a block: its phase, grid, rows, and whose they
    are. Nothing when nobody traces."""
    if not enabled():
        return NOTHING
    models: collections.Counter[str] = collections.Counter()
    tenants: collections.Counter[str] = collections.Counter()
    for item in batch.items:
        request = item.sequence.request
        models[request.model] += item.q_len
        tenants[_tenant(request.cache_salt)] += item.q_len
    return TraceAnnotation(
        name,
        phase="prefill" if batch.bucket.q_len > 1 else "decode",
        grid=str(batch.bucket),
        rows=batch.num_rows,
        models=_mix(models),
        tenants=_mix(tenants),
    )


def _tenant(salt: str) -> str:
    """A short name for who has a cache salt, which itself stays secret."""
    return hashlib.sha256(salt.encode()).hexdigest()[:6] if salt else "-"


def _mix(counts: collections.Counter[str]) -> str:
    """ "base:12 copy:4": rows of each, most first. A comma would end the value in a trace."""
    return " ".join(f"{name}:{count}" for name, count in counts.most_common())
