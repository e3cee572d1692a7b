"""Many LoRA adapters of several ranks in one batch, against the base alone."""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.report import median, progress, spread
from bench.run import Measured, make_engine, measure
from bench.stepper import Stepper
from bench.workload import Lengths, describe, generate, zipf
from jblock.engine.config import DTYPES, EngineConfig

RANKS = (8, 16, 32)
_PROMPT = 16
_PAGE = 64
_BATCH = 32
_ZIPF = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25, help="interleaved repetitions")
    parser.add_argument(
        "--host_cache_mb", type=int, default=2000, help="of the engine with 1,000 adapters"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`tokens_per_second_ratio`: decoding 32 sequences of 32 adapters over 32 of the base alone.

    The two sides are two agents, so that the base pays for no slot table; steps take turns.

    `registered_1000_ratio`: generated tokens/s of a closed backlog over 1,000 registered adapters of Zipf
    popularity, most of which are not on the device when they are asked for, over the same backlog of
    the base alone; 32 in flight, rounds in turn.
    """
    shape = TINY if args.quick else MODEL_250M
    rounds, steps = (2, 2) if args.quick else (args.rounds, 2)
    decoded = steps * (rounds + 1) + 12
    length = -(-(_PROMPT + decoded) // _PAGE) * _PAGE
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=_BATCH,
        adapter_slots=args.adapters,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + 4 * _BATCH * shape.kv_floats_per_token * length // 10**6,
        decode_sizes=(_BATCH,),
        prefill_grids=((8, _PROMPT),),
    )
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    progress("loading the base alone")
    base = Stepper(zoo, zoo.served, config, args.cache)
    adapters = [
        zoo.add_adapter(f"lora-{i}", "base", RANKS[i % len(RANKS)]).name
        for i in range(args.adapters)
    ]
    progress(f"loading the base with {len(adapters)} adapters of ranks {RANKS}")
    mixed = Stepper(zoo, zoo.served, config, args.cache)
    rng = np.random.default_rng(0)
    chosen = rng.choice(adapters, _BATCH, replace=len(adapters) < _BATCH).tolist()
    # The adapters come to the device first: those who wait for theirs would begin after others end.
    for name in dict.fromkeys(chosen):
        mixed.first_token(name, mixed.prompt(name, _PROMPT))
    ids = base.fill(["base"] * _BATCH, _PROMPT, decoded), mixed.fill(chosen, _PROMPT, decoded)
    base.steps(steps, _BATCH), mixed.steps(steps, _BATCH)
    times: dict[str, list[float]] = {"base": [], "mixed": []}
    sides = {"base": base, "mixed": mixed}
    for i in range(rounds):
        for name in ("base", "mixed") if i % 2 else ("mixed", "base"):
            times[name].append(sides[name].steps(steps, _BATCH) / steps)
    base.drain(ids[0]), mixed.drain(ids[1])
    ratios = [a / b for a, b in zip(times["base"], times["mixed"], strict=True)]
    progress(f"tokens/s over the base's: {median(ratios)}")
    table_bytes = mixed.stats().resident_bytes - base.stats().resident_bytes
    compiles = sum(s.stats().compiles_on_serving_path for s in sides.values())
    del base, mixed, sides
    many = _registered(args, shape)
    return {
        "lora": {
            "tokens_per_second_ratio": median(ratios),
            "registered_1000_ratio": many["ratio"]["median"],
        },
        "dtype": args.dtype,
        "detail": {
            "ratio": spread(ratios),
            "ratio_of_best": round(min(times["base"]) / min(times["mixed"]), 4),
            "step_ms": {n: spread([t * 1e3 for t in ts], 3) for n, ts in times.items()},
            "tokens_per_second": {
                n: round(_BATCH / statistics.median(ts), 1) for n, ts in times.items()
            },
            "adapters": args.adapters,
            "ranks": list(RANKS),
            "slot_table_bytes": table_bytes,
            "registered": many,
        },
        "compiles_on_serving_path": compiles + many["compiles_on_serving_path"],
    }


def _registered(args: argparse.Namespace, shape: ModelShape) -> dict[str, Any]:
    """A backlog over many registered adapters, and over their base alone."""
    count, requests, rounds = (100, 24, 1) if args.quick else (1000, 64, 3)
    lengths = Lengths(prompt=(16, 64), output=(4, 8) if args.quick else (64, 128))
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=_BATCH,
        max_model_len=192,
        page_size=_PAGE,
        kv_memory_mb=1 + 4 * _BATCH * shape.kv_floats_per_token * 192 // 10**6,
        decode_sizes=(8, _BATCH),
        prefill_grids=((1, 16), (4, 16), (1, 64), (4, 64)),
        adapter_slots=8 if args.quick else 64,
        host_cache_mb=args.host_cache_mb,
    )
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    engines = {"base": make_engine(zoo, config, args.cache)}
    names = [f"lora-{i}" for i in range(count)]
    for i, name in enumerate(names):
        zoo.add_adapter(name, "base", RANKS[i % len(RANKS)])
    began = time.monotonic()
    engines["mixed"] = make_engine(zoo, config, args.cache)
    started = time.monotonic() - began
    progress(f"an engine with {count} adapters registered was there in {started:.1f} s")
    figures: dict[str, list[Measured]] = {name: [] for name in engines}
    arrivals = []
    try:
        for i in range(rounds + 1):
            for name in ("base", "mixed") if i % 2 else ("mixed", "base"):
                asked = generate(
                    models=names if name == "mixed" else ["base"],
                    count=requests,
                    lengths=lengths,
                    vocab_size=shape.vocab_size,
                    seed=i,
                    popularity=zipf(count, _ZIPF) if name == "mixed" else zipf(1, 1),
                )
                measured = measure(engines[name], asked, _BATCH)
                if i:  # the first round fills what a server that ran for long has filled
                    figures[name].append(measured)
                    arrivals += asked if name == "mixed" else []
        stats = engines["mixed"].stats()
    finally:
        for engine in engines.values():
            engine.close()
    rates = {name: [m.tokens_per_second for m in ms] for name, ms in figures.items()}
    ratios = [a / b for a, b in zip(rates["mixed"], rates["base"], strict=True)]
    progress(f"with {count} adapters registered: {median(ratios)}")
    return {
        "adapters": count,
        "ratio": spread(ratios),
        "tokens_per_second": {n: round(statistics.median(r), 1) for n, r in rates.items()},
        "failed": sum(m.failed for ms in figures.values() for m in ms),
        "workload": describe(arrivals),
        "start_s": round(started, 2),
        "weight_cache": {
            name: getattr(stats, name)
            for name in (
                "adapters_resident",
                "residency_hits",
                "residency_misses",
                "host_hits",
                "host_misses",
                "host_bytes",
                "loads",
                "evictions",
            )
        },
        "compiles_on_serving_path": stats.compiles_on_serving_path,
    }
