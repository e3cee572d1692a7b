"""Changes of what is served while requests stream: nothing fails, nothing pauses, nothing stays behind."""

import argparse
import gc
import threading
import time
from typing import Any

import jax

from bench.models import DEMO_3M, MODEL_250M, TINY, MemoryZoo, fine_tunes
from bench.report import percentile, progress
from bench.run import make_engine, measure
from bench.workload import Lengths, generate
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine

_PAGE = 64
# New weights of one chain; an older version of it again; the programs that decode compiled anew; a chain
# leaves, so that others join up into longer blocks with programs of their own; and it comes back.
KINDS = ("weights", "version", "executables", "fewer chains", "all chains")
_SHAPES = {"tiny": TINY, "demo": DEMO_3M, "250m": MODEL_250M}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--model", choices=tuple(_SHAPES), default="250m")
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load without swaps")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two swaps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`failed` requests, and `gap_ratio`: the largest gap between two tokens while swapping over the
    99th percentile of the gaps without."""
    shape = _SHAPES["tiny" if args.quick else args.model]
    swaps, seconds, pause = (5, 1.0, 0.1) if args.quick else (args.swaps, args.seconds, args.pause)
    in_flight = 8
    length = 3 * _PAGE
    zoo = fine_tunes(shape, 3, shape.layers // 4)
    config = EngineConfig(
        max_num_seqs=in_flight,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + in_flight * length * 4 * shape.kv_floats_per_token // 10**6,
        decode_sizes=(4,) if args.quick else (1, 2, 4, 8),
        prefill_grids=((1, 16),),
    )
    progress("loading and compiling")
    engine = make_engine(zoo, config, args.cache)
    try:
        measure(engine, _load(zoo, in_flight), in_flight)
        before = _bytes(engine)
        began = time.monotonic()
        calm = measure(engine, _load(zoo), in_flight, lambda: time.monotonic() - began > seconds)
        swapping = threading.Thread(target=_swap, args=(engine, zoo, swaps, pause), daemon=True)
        swapping.start()
        swapped = measure(engine, _load(zoo), in_flight, lambda: not swapping.is_alive())
        swapping.join()
        measure(engine, _load(zoo, in_flight), in_flight)
        engine.wait_until_warm()
        after = _bytes(engine)
        stats = engine.stats()
    finally:
        engine.close()
    p99 = percentile(calm.gaps_s, 99)
    return {
        "hotswap": {
            "failed": swapped.failed,
            "gap_ratio": round(max(swapped.gaps_s) / p99, 4),
        },
        "detail": {
            "model": "tiny" if args.quick else args.model,
            "swaps": {k: len(range(i, swaps, len(KINDS))) for i, k in enumerate(KINDS)},
            "gap_p99_calm_s": round(p99, 5),
            "greatest_gap_calm_s": round(max(calm.gaps_s), 5),
            "calm": calm.summary(),
            "swapped": swapped.summary(),
            "bytes_before": before,
            "bytes_after": after,
        },
        "compiles_on_serving_path": stats.compiles_on_serving_path,
    }


def _load(zoo: MemoryZoo, count: int = 5000) -> list:
    """Requests for the chain that never changes and for one that does, in turn."""
    return generate(
        models=["tune-0", "tune-1"],
        count=count,
        lengths=Lengths(prompt=(16, 16), output=(16, 96)),
        vocab_size=zoo.shape.vocab_size,
        seed=0,
    )


def _swap(engine: ThreadEngine, zoo: MemoryZoo, swaps: int, pause: float) -> None:
    """The kinds of KINDS in turn."""
    everything = ["tune-0", "tune-1", "tune-2"]
    for i in range(swaps):
        time.sleep(pause)
        kind = KINDS[i % len(KINDS)]
        began = time.monotonic()
        if kind == "executables":
            engine.renew()
        elif kind == "weights":
            zoo.retune("tune-1")
            engine.serve(everything)
        elif kind == "version":
            engine.serve(["tune-0", "tune-1@1", "tune-2"])
        else:
            engine.serve(everything[: 2 if kind == "fewer chains" else 3])
        progress(f"swap {i + 1} of {swaps}: {kind}, {time.monotonic() - began:.2f} s")
    engine.serve(["tune-0", "tune-1@1", "tune-2"])
    engine.wait_until_warm()


def _bytes(engine: ThreadEngine) -> dict[str, int]:
    """Parameters the engine counts, and all device arrays of the process."""
    gc.collect()
    return {
        "resident": engine.stats().resident_bytes,
        "device": sum(array.nbytes for array in jax.live_arrays()),
    }
