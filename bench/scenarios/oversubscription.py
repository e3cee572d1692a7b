"""KV memory for a quarter of the sequences offered: all finish, and say what they say unloaded; what
gives way is copied to the host, or computed anew."""

import argparse
import dataclasses
from typing import Any

from bench import exactness
from bench.models import DEMO_3M, MODEL_250M, TINY, fine_tunes
from bench.report import progress
from bench.run import make_engine, measure
from bench.workload import Lengths, describe, generate
from jblock.engine.config import EngineConfig

_PAGE = 64
_SHAPES = {"tiny": TINY, "demo": DEMO_3M, "250m": MODEL_250M}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--model", choices=tuple(_SHAPES), default="demo")
    parser.add_argument("--requests", type=int, default=500)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All requests at once on an engine with KV for a quarter of them, which swaps or computes anew as
    its measured rates say; on one that always computes anew; and on one with KV for the most it runs
    together, few at a time."""
    shape = _SHAPES["tiny" if args.quick else args.model]
    count = 32 if args.quick else args.requests
    lengths = (
        Lengths(prompt=(8, 96), output=(8, 96))
        if not args.quick
        else Lengths(prompt=(4, 32), output=(4, 16))
    )
    zoo = fine_tunes(shape, 4, shape.layers // 4)
    length = 3 * _PAGE
    seqs = 16 if args.quick else 64
    full = seqs * length * 4 * shape.kv_floats_per_token
    config = EngineConfig(
        max_num_seqs=seqs,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + full // 10**6,
        decode_sizes=(seqs,) if args.quick else (4, seqs),
        prefill_grids=((4, 16),) if args.quick else ((4, 16), (4, 64)),
    )
    arrivals = generate(
        models=sorted(zoo.served),
        count=count,
        lengths=lengths,
        vocab_size=shape.vocab_size,
        seed=0,
    )
    squeezed = dataclasses.replace(
        config, kv_memory_mb=1 + max(full // 4, 4 * length * shape.kv_floats_per_token) // 10**6
    )
    runs, compiles, stats = {}, 0, {}
    for name, settings, in_flight in (
        ("squeezed", squeezed, None),
        ("recomputing", dataclasses.replace(squeezed, host_kv_memory_mb=0), None),
        ("unloaded", config, 4),
    ):
        progress(f"{count} requests, {name}")
        engine = make_engine(zoo, settings, args.cache)
        try:
            runs[name] = measure(engine, arrivals, in_flight)
            stats[name] = engine.stats()
            compiles += stats[name].compiles_on_serving_path
        finally:
            engine.close()
    outputs = exactness.compare(zoo, runs["unloaded"].traces, runs["squeezed"].traces).to_json()
    progress(f"outputs: {outputs}")
    recomputed = exactness.compare(zoo, runs["unloaded"].traces, runs["recomputing"].traces)
    swaps = stats["squeezed"].kv_offloads
    return {
        "oversubscription": {
            "offered": count,
            "finished": count - runs["squeezed"].failed,
            **outputs,
            "swaps": swaps,
            "recomputes": stats["squeezed"].preemptions - swaps,
            "tokens_per_second": round(runs["squeezed"].tokens_per_second, 2),
            "tokens_per_second_recomputing": round(runs["recomputing"].tokens_per_second, 2),
        },
        "recomputing": {
            "finished": count - runs["recomputing"].failed,
            "recomputes": stats["recomputing"].preemptions,
            **recomputed.to_json(),
        },
        "detail": {
            "model": "tiny" if args.quick else args.model,
            "pages": {name: s.pages_total for name, s in stats.items()},
            "prompt_tokens_computed": {name: s.prompt_tokens for name, s in stats.items()},
            "workload": describe(arrivals),
            **{name: measured.summary() for name, measured in runs.items()},
        },
        "compiles_on_serving_path": compiles,
    }
