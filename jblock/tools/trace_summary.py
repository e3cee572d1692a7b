"""Adds up the events of a captured XLA profiler trace: `python -m jblock.tools.trace_summary FOLDER`."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from jax.profiler import ProfileData

from jblock.engine.runner.tracing import PHASES


@dataclasses.dataclass(frozen=True)
class Line:
    """Events of one name in a trace: what kind they are, how many, and seconds of all together."""

    kind: str
    name: str
    count: int
    seconds: float


def summarize(files: Iterable[Path]) -> list[Line]:
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
    """Prints the summary of the trace in a folder: `python -m jblock.tools.trace_summary FOLDER`."""
    files = sorted(Path(sys.argv[1]).rglob("*.xplane.pb")) if len(sys.argv) == 2 else []
    if not files:
        sys.exit("trace_summary: give the folder of a captured trace, with *.xplane.pb in it")
    print(f"{'kind':8} {'events':>7} {'ms':>9}  name")
    for line in summarize(files):
        print(f"{line.kind:8} {line.count:7} {line.seconds * 1e3:9.2f}  {line.name}")


if __name__ == "__main__":
    main()
