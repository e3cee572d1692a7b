"""Prompts with a long common beginning, one after another: what the prefix cache saves."""

import argparse
import statistics
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo
from bench.report import median, progress, spread
from bench.stepper import Stepper
from jblock.engine.config import DTYPES, EngineConfig

_PAGE = 64
_SUFFIX = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="prefixes tried")
    parser.add_argument("--later", type=int, default=6, help="prompts after the first of each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`ttft_ratio`: time to first token of the later prompts over that of the first."""
    shape, common = (TINY, 128) if args.quick else (MODEL_250M, 1024)
    rounds, later = (2, 2) if args.quick else (args.rounds, args.later)
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    length = common + _PAGE
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=4,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + 2 * length * 4 * shape.kv_floats_per_token // 10**6,
        decode_sizes=(1,),
        prefill_grids=((1, _SUFFIX), (1, min(common, 256))),
    )
    progress("loading and compiling")
    stepper = Stepper(zoo, zoo.served, config, args.cache)
    first, others, ratios = [], [], []
    for i in range(-1, rounds):
        prefix = stepper.prompt("base", common)
        times = [
            stepper.first_token("base", (*prefix, *stepper.prompt("base", _SUFFIX)))
            for _ in range(1 + later)
        ]
        if i >= 0:
            first.append(times[0])
            others.extend(times[1:])
            ratios.append(statistics.median(times[1:]) / times[0])
    stats = stepper.stats()
    progress(f"first {median(first, 3)} s, later {median(others, 3)} s")
    return {
        "prefix": {"ttft_ratio": median(ratios)},
        "dtype": args.dtype,
        "detail": {
            "ratio": spread(ratios),
            "first_s": spread(first, 5),
            "later_s": spread(others, 5),
            "prefix_tokens": common,
            "suffix_tokens": _SUFFIX,
            "cached_tokens": stats.cached_tokens,
            "prompt_tokens_computed": stats.prompt_tokens,
        },
        "compiles_on_serving_path": stats.compiles_on_serving_path,
    }
