"""Whether the device waits for the host while decoding: its idle share, from a trace of XLA's profiler."""

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from bench.models import MODEL_250M, TINY, MemoryZoo
from bench.report import progress
from bench.run import make_engine
from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.runner.tracing import STEP

_PAGE = 64
_PROMPT = 8
# Threads of XLA's CPU client, and the tracks of a GPU or TPU, in a trace.
_DEVICE_THREADS = ("tf_XLA", "Stream", "XLA Ops")
Span = tuple[float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--seconds", type=float, default=3.0, help="of decoding in each trace")
    parser.add_argument("--keep", type=Path, help="keep the traces in this folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`b8_idle`, `b32_idle`: share of the time in which no device thread computed anything."""
    shape = TINY if args.quick else MODEL_250M
    seconds = 0.3 if args.quick else args.seconds
    sizes = (8, 32)
    length = 8 * _PAGE
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    config = EngineConfig(
        max_num_seqs=max(sizes),
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + 4 * max(sizes) * shape.kv_floats_per_token * length // 10**6,
        decode_sizes=sizes,
        prefill_grids=((8, 16),),
    )
    progress("loading and compiling")
    engine = make_engine(zoo, config, args.cache)
    figures, detail = {}, {}
    try:
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(args.keep or folder) / f"b{size}"
                detail[f"b{size}"] = _trace(engine, size, length, seconds, path)
            figures[f"b{size}_idle"] = detail[f"b{size}"]["idle"]
            progress(f"batch {size}: {detail[f'b{size}']}")
        compiles = engine.stats().compiles_on_serving_path
    finally:
        engine.close()
    return {"overlap": figures, "detail": detail, "compiles_on_serving_path": compiles}


def _trace(
    engine: ThreadEngine, size: int, length: int, seconds: float, path: Path
) -> dict[str, float]:
    """Traces steady decoding of `size` sequences; what the device did meanwhile."""
    for i in range(size):
        engine.submit(
            Request(
                request_id=f"r{i}",
                model="base",
                token_ids=tuple(range(1, 1 + _PROMPT)),
                cache_salt=str(i),
                sampling=SamplingParams(max_tokens=length, ignore_eos=True),
            )
        )
    began: set[str] = set()
    while len(began) < size:
        began.update(o.request_id for o in engine.poll(10.0) if o.token_ids)
    options = jax.profiler.ProfileOptions()
    # Tracing every Python call would slow down the host alone, and so make the device wait.
    options.python_tracer_level = 0
    tokens = 0
    with jax.profiler.trace(str(path), profiler_options=options):
        end = time.perf_counter() + seconds
        ended = 0
        while time.perf_counter() < end and not ended:
            outputs = engine.poll(seconds)
            tokens += sum(len(o.token_ids) for o in outputs)
            ended += sum(o.finish_reason is not None for o in outputs)
    for i in range(size):
        engine.cancel(f"r{i}")
    _drain(engine)
    spans, steps = device_spans(path)
    # From the first step to the last: before and after it the profiler was being started and stopped.
    first, last = steps[1][0], steps[-1][0]
    busy = covered(spans, first, last)
    return {
        "idle": round(1 - busy / (last - first), 4),
        "steps": len(steps) - 2,
        "step_ms": round((last - first) / (len(steps) - 2) / 1e3, 3),
        "longest_wait_ms": round(longest_gap(spans, first, last) / 1e3, 3),
        "tokens": tokens,
    }


def _drain(engine: ThreadEngine) -> None:
    while engine.stats().running or engine.poll(0.1):
        pass


def device_spans(path: Path) -> tuple[list[Span], list[Span]]:
    """Of the newest trace below a folder: when a device thread computed, and when the loop's steps
    were, in microseconds, by beginning.

    Raises:
      ValueError: the trace holds no work of a device, or fewer than three steps.
    """
    file = max(path.rglob("*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    with gzip.open(file) as stream:
        events = json.load(stream)["traceEvents"]
    threads = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["args"]["name"].startswith(_DEVICE_THREADS)
    }
    complete = [e for e in events if e.get("ph") == "X"]
    spans = sorted(_span(e) for e in complete if (e["pid"], e["tid"]) in threads)
    steps = sorted(_span(e) for e in complete if e["name"] == STEP)
    if not spans or len(steps) < 3:
        raise ValueError(
            f"trace {str(file)!r} has {len(spans)} spans of device threads and {len(steps)} steps; "
            "trace for longer, or name this backend's threads in _DEVICE_THREADS"
        )
    return spans, steps


def _span(event: Mapping[str, Any]) -> Span:
    return event["ts"], event["ts"] + event.get("dur", 0.0)


def covered(spans: Iterable[Span], first: float, last: float) -> float:
    """How much of [first, last] lies in at least one of the spans, which come by beginning."""
    return (last - first) - sum(b - a for a, b in gaps(spans, first, last))


def longest_gap(spans: Iterable[Span], first: float, last: float) -> float:
    """The longest stretch of [first, last] outside all spans."""
    return max((b - a for a, b in gaps(spans, first, last)), default=0.0)


def gaps(spans: Iterable[Span], first: float, last: float) -> list[Span]:
    """The stretches of [first, last] that lie in none of the spans, which come by beginning."""
    found, reached = [], first
    for begin, end in spans:
        if begin > last:
            break
        if begin > reached:
            found.append((reached, begin))
        reached = max(reached, end)
    if reached < last:
        found.append((reached, last))
    return found
