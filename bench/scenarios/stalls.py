"""What streams notice of long prompts: gaps between their tokens, with a step's time bounded and without."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.report import percentile, progress
from bench.run import Measured, make_engine, measure
from bench.workload import Arrival
from jblock.engine.config import EngineConfig
from jblock.engine.scheduling.step_budget import NO_LIMIT

_PAGE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      shape: of the model.
      streams: sequences that decode all the time.
      stream_tokens: of each of them.
      prompts: how many long prompts come, two at a time.
      prompt: their tokens.
      every: seconds between two arrivals.
    """

    shape: ModelShape = MODEL_250M
    streams: int = 4
    stream_tokens: int = 320
    prompts: int = 6
    prompt: int = 900
    every: float = 6.0


_QUICK = Sizes(shape=TINY, stream_tokens=120, prompts=4, prompt=300, every=0.02)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument(
        "--step_ms", type=int, default=EngineConfig.step_ms, help="of the bounded side"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gaps of the streams, bounded over unbounded, and what the prompts pay for it."""
    sizes = _QUICK if args.quick else Sizes()
    zoo = MemoryZoo(sizes.shape)
    zoo.add_base("base")
    sides: dict[str, Measured] = {}
    compiles = 0
    for name, step_ms in (("unbounded", NO_LIMIT), ("bounded", args.step_ms)):
        progress(f"loading and compiling, {name}")
        engine = make_engine(zoo, _config(sizes, step_ms), args.cache)
        try:
            measure(engine, _arrivals(sizes, seed=1)[: sizes.streams], sizes.streams)
            sides[name] = measure(engine, _arrivals(sizes, seed=2))
            compiles += engine.stats().compiles_on_serving_path
        finally:
            engine.close()
        progress(f"{name}: {_figures(sizes, sides[name])}")
    figures = {name: _figures(sizes, measured) for name, measured in sides.items()}
    bounded, unbounded = figures["bounded"], figures["unbounded"]
    return {
        "stalls": {
            "gap_max_ms": bounded["gap_max_ms"],
            "gap_max_ratio": round(bounded["gap_max_ms"] / unbounded["gap_max_ms"], 4),
            "gap_p99_ratio": round(bounded["gap_p99_ms"] / unbounded["gap_p99_ms"], 4),
            "prompt_ratio": round(
                bounded["prompt_first_token_s"] / unbounded["prompt_first_token_s"], 4
            ),
        },
        "step_ms": args.step_ms,
        "detail": figures,
        "failed": sum(m.failed for m in sides.values()),
        "compiles_on_serving_path": compiles,
    }


def _config(sizes: Sizes, step_ms: int) -> EngineConfig:
    length = -(-(sizes.prompt + 16) // _PAGE) * _PAGE
    sequences = sizes.streams + 4
    return EngineConfig(
        max_num_seqs=sequences,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + 4 * sequences * sizes.shape.kv_floats_per_token * length // 10**6,
        decode_sizes=(1, 4, 8),
        prefill_grids=((1, 16), (4, 16), (1, 64), (4, 64), (1, 256)),
        step_ms=step_ms,
    )


def _arrivals(sizes: Sizes, seed: int) -> list[Arrival]:
    """The streams at once, then pairs of long prompts."""
    rng = np.random.default_rng(seed)

    def arrival(time: float, prompt: int, tokens: int) -> Arrival:
        ids = tuple(rng.integers(0, sizes.shape.vocab_size, prompt).tolist())
        return Arrival(time=time, model="base", prompt=ids, max_tokens=tokens)

    streams = [arrival(0.0, 16, sizes.stream_tokens) for _ in range(sizes.streams)]
    longs = [arrival(sizes.every * (1 + i // 2), sizes.prompt, 2) for i in range(sizes.prompts)]
    return streams + longs


def _figures(sizes: Sizes, measured: Measured) -> dict[str, float]:
    """Gaps of the streams from their third token on, and times to first token of the long prompts."""
    streams = [t for t in measured.traces if len(t.arrival.prompt) < sizes.prompt]
    longs = [t for t in measured.traces if len(t.arrival.prompt) == sizes.prompt]
    waits = [b - a for t in streams for a, b in zip(t.times[2:], t.times[3:], strict=False)]
    firsts = sorted(t.times[0] - t.due for t in longs)
    return {
        "gap_p50_ms": round(percentile(waits, 50) * 1e3, 3),
        "gap_p99_ms": round(percentile(waits, 99) * 1e3, 3),
        "gap_max_ms": round(max(waits) * 1e3, 3),
        "prompt_first_token_s": round(firsts[len(firsts) // 2], 4),
        "seconds": round(measured.seconds, 3),
    }
