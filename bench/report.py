"""What every scenario prints beside its own keys, and how a spread is told."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BEGIN = time.monotonic()


def progress(message: str) -> None:
    """One line on stderr, with the seconds since start."""
    print(f"[{time.monotonic() - _BEGIN:7.1f} s] {message}", file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Least, median, greatest and number of repetitions: how much the machine's noise moved them."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def median(values: Sequence[float], digits: int = 4) -> float:
    """The median, rounded."""
    return round(statistics.median(values), digits)


def significant(value: float) -> float:
    """To three digits that say something, however small it is: a share that is not nothing is not 0."""
    return float(f"{value:.3g}")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of them do not exceed (nearest rank)."""
    if not values:
        raise ValueError("percentile of nothing: no request finished")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def environment() -> dict[str, Any]:
    """Versions, CPU and threads: what a figure depends on beside the code."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {
            "jax": importlib.metadata.version("jax"),
            "jaxlib": importlib.metadata.version("jaxlib"),
            "python": platform.python_version(),
        },
        "cpu": cpu,
        "threads": threads,
    }


def line(scenario: str, quick: bool, result: dict[str, Any]) -> str:
    """The JSON line of a run."""
    return json.dumps({"scenario": scenario, "quick": quick, **result, **environment()})
