"""Names in a profiler's trace: what a batch holds, and a summary of a captured trace.

An XLA profiler session shows the loop's phases and blocks from here, and under them every program by its own
name (`ProgramKey.name`), inside which `jax.named_scope`s name the parts. Without a session nothing of a
batch's description is made.
"""

import collections
import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from jax.profiler import ProfileData, TraceAnnotation

from jblock.engine.batching import Batch

# Steps, and what the loop does in one.
STEP = "sweep"
PHASES = ("load", "admit", "plan", STEP, "read_tokens")

_NOTHING = contextlib.nullcontext()


def block(name: str, batch: Batch) -> contextlib.AbstractContextManager:
    """An annotation around what is enqueued for a batch in a block: its phase, grid, rows, and whose they
    are. Nothing when nobody traces."""
    if not TraceAnnotation.is_enabled():
        return _NOTHING
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


@dataclasses.dataclass(frozen=True)
class Line:
    """Events of one name in a trace: what kind they are, how many, and seconds of all together."""

    kind: str
    name: str
    count: int
    seconds: float


def summarise(files: Iterable[Path]) -> list[Line]:
    """What the events of some `*.xplane.pb` files add up to, longest first within a kind.

    Kinds are "phase" (of the loop, on the host), "block" (enqueueing of a batch, by block and phase), "mix"
    (rows of models met in one block) and "program" (what the device ran, by program).
    """
    totals: dict[tuple[str, str], list[float]] = {}

    def add(kind: str, name: str, nanoseconds: float) -> None:
        entry = totals.setdefault((kind, name), [0, 0.0])
        entry[0] += 1
        entry[1] += nanoseconds / 1e9

    for file in files:
        for plane in ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = {k: v for k, v in event.stats if k is not None}
                    if event.name in PHASES:
                        add("phase", event.name, event.duration_ns)
                    elif "grid" in stats:
                        add("block", f"{event.name} {stats['phase']}", event.duration_ns)
                        add("mix", f"{event.name}: {stats['models']}", event.duration_ns)
                    elif "hlo_module" in stats:
                        module = str(stats["hlo_module"]).removeprefix("jit_")
                        add("program", module, event.duration_ns)
    lines = [Line(kind, name, int(n), s) for (kind, name), (n, s) in totals.items()]
    order = ("phase", "block", "mix", "program")
    return sorted(lines, key=lambda e: (order.index(e.kind), -e.seconds))


def main() -> None:
    """Prints the summary of the trace in a folder: `python -m jblock.engine.tracing FOLDER`."""
    files = sorted(Path(sys.argv[1]).rglob("*.xplane.pb")) if len(sys.argv) == 2 else []
    if not files:
        sys.exit("tracing: give the folder of a captured trace, with *.xplane.pb in it")
    print(f"{'kind':8} {'events':>7} {'ms':>9}  name")
    for line in summarise(files):
        print(f"{line.kind:8} {line.count:7} {line.seconds * 1e3:9.2f}  {line.name}")


if __name__ == "__main__":
    main()
