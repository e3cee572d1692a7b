"""Many LoRA adapters of several ranks in one batch, against the base alone."""

import argparse
import statistics
from typing import Any

import numpy as np

from bench.models import MODEL_250M, TINY, MemoryZoo
from bench.report import median, progress, spread
from bench.stepper import Stepper
from jblock.engine.config import DTYPES, EngineConfig

RANKS = (8, 16, 32)
_PROMPT = 16
_PAGE = 64
_BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25, help="interleaved repetitions")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`tokens_per_second_ratio`: decoding 32 sequences of 32 adapters over 32 of the base alone.

    The two sides are two agents, so that the base pays for no slot table; steps take turns.
    """
    shape = TINY if args.quick else MODEL_250M
    rounds, steps = (2, 2) if args.quick else (args.rounds, 2)
    decoded = steps * (rounds + 1) + 12
    length = -(-(_PROMPT + decoded) // _PAGE) * _PAGE
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=_BATCH,
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
    return {
        "lora": {"tokens_per_second_ratio": median(ratios)},
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
            "slot_table_bytes": mixed.stats().resident_bytes - base.stats().resident_bytes,
        },
        "compiles_on_serving_path": sum(s.stats().compiles_on_serving_path for s in sides.values()),
    }
