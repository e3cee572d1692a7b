"""Eight full fine-tunes served from shared blocks, against one whole model each ("PM").

PM is this engine with sharing off: the same kernels, the same KV memory, one batch a model.
"""

import argparse
import dataclasses
import gc
from pathlib import Path
from typing import Any

from bench import exactness
from bench.models import MODEL_250M, TINY, ModelShape, fine_tunes
from bench.report import median, percentile, progress, spread
from bench.run import InlineEngine, Measured, interleaved_backlog, measure
from bench.scenarios import sharing_curve
from bench.stepper import Stepper
from bench.workload import Lengths, describe, generate
from jblock.engine.config import EngineConfig

_PAGE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      shape: of the models.
      models: how many fine-tunes.
      private: last layers a fine-tune has of its own, in the main and in the second variant.
      in_flight: sequences at once.
      prompt: tokens of a prompt.
      output: tokens of an answer.
      backlog: requests of one repetition of the closed backlog.
      rounds: repetitions of it.
      open_requests: requests of the open loop.
      open_output: tokens of their answers.
      decode_sizes: rows decode programs are compiled for, on both sides.
      prefill_sizes: prompts prefill programs are compiled for, on both sides.
      overload: its rate over what PM finishes of such requests in a closed backlog.
    """

    shape: ModelShape = MODEL_250M
    models: int = 8
    private: tuple[int, int] = (4, 1)
    in_flight: int = 16
    prompt: int = 64
    output: int = 128
    backlog: int = 32
    rounds: int = 2
    open_requests: int = 400
    open_output: int = 32
    decode_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    prefill_sizes: tuple[int, ...] = (1, 2, 4)
    overload: float = 1.5


_QUICK = Sizes(
    shape=TINY,
    models=4,
    private=(2, 1),
    in_flight=8,
    prompt=16,
    output=8,
    backlog=16,
    rounds=2,
    open_requests=16,
    open_output=8,
    decode_sizes=(2, 8),
    prefill_sizes=(2,),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--rounds", type=int, help="repetitions of the closed backlog")
    parser.add_argument(
        "--only",
        choices=("throughput", "latency"),
        help="the closed backlog or the open loop alone",
    )
    parser.add_argument(
        "--curve", action="store_true", help="also the ratio over rows a model; --plot implies it"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Throughput, latency and memory of shared blocks over PM."""
    sizes = _QUICK if args.quick else Sizes()
    if args.rounds:
        sizes = dataclasses.replace(sizes, rounds=args.rounds)
    result = _engines(sizes, args.cache, args.only)
    if args.curve or args.plot:
        gc.collect()  # The engines above are gone; the curve loads its own.
        result["curve"] = sharing_curve.run(
            sizes.shape, sizes.models, sizes.private[0], args.cache, quick=args.quick
        )
        result["compiles_on_serving_path"] += result["curve"].pop("compiles_on_serving_path")
    return result


def _engines(sizes: Sizes, cache: Path, only: str | None) -> dict[str, Any]:
    progress(f"loading {sizes.models} models of {sizes.shape.layers} layers, one each (PM)")
    zoo = fine_tunes(sizes.shape, sizes.models, sizes.private[0])
    config = _config(sizes)
    sides = {"pm": Stepper(zoo, zoo.served, dataclasses.replace(config, share=False), cache)}
    for private in sizes.private if only != "latency" else sizes.private[:1]:
        name = f"{sizes.shape.layers - private}of{sizes.shape.layers}"
        progress(f"loading the same with {name} layers shared")
        variant = fine_tunes(sizes.shape, sizes.models, private)
        sides[name] = Stepper(variant, variant.served, config, cache)
    figures = _measure(zoo, sides, sizes) if only != "latency" else {"sharing": {}, "detail": {}}
    if only != "throughput":
        ratio, figures["detail"]["open_loop"] = _open(zoo, sides, sizes)
        figures["sharing"]["p95_ratio"] = ratio
    return figures | {
        "compiles_on_serving_path": sum(
            side.stats().compiles_on_serving_path for side in sides.values()
        )
    }


def _measure(zoo: Any, sides: dict[str, Stepper], sizes: Sizes) -> dict[str, Any]:
    _, main, second = sides
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    for i in range(-1, sizes.rounds):
        arrivals = generate(
            models=sorted(zoo.served),
            count=sizes.backlog if i >= 0 else sizes.in_flight,
            lengths=_lengths(sizes, sizes.output if i >= 0 else min(sizes.output, 4)),
            vocab_size=sizes.shape.vocab_size,
            seed=i + 1,
        )
        for name, measured in interleaved_backlog(sides, arrivals).items():
            if i >= 0:
                runs[name].append(measured)
                progress(f"backlog {i}, {name}: {measured.tokens_per_second:.1f} tokens/s")
    ratios = {
        name: [
            ours.tokens_per_second / pm.tokens_per_second
            for ours, pm in zip(runs[name], runs["pm"], strict=True)
        ]
        for name in (main, second)
    }
    stats = {name: side.stats() for name, side in sides.items()}
    sharing: dict[str, Any] = {
        "tokens_per_second_ratio": median(ratios[main]),
        "tokens_per_second_ratio_15of16": median(ratios[second]),
        "weight_bytes_ratio": round(stats[main].resident_bytes / stats["pm"].resident_bytes, 4),
    }
    detail: dict[str, Any] = {
        "shared_layers": [main, second],
        "ratio": {name: spread(values) for name, values in ratios.items()},
        "tokens_per_second": {
            name: spread([r.tokens_per_second for r in measured], 2)
            for name, measured in runs.items()
        },
        "weight_bytes": {name: s.resident_bytes for name, s in stats.items()},
        "last_backlog": {name: measured[-1].summary() for name, measured in runs.items()},
    }
    pairs = [(a, b) for a, b in zip(runs["pm"], runs[main], strict=True)]
    outputs = exactness.compare(
        zoo, [t for a, _ in pairs for t in a.traces], [t for _, b in pairs for t in b.traces]
    )
    progress(f"outputs against PM: {outputs.to_json()}")
    return {
        "sharing": sharing,
        "outputs": outputs.to_json(),
        "detail": detail,
        "failed": sum(m.failed for measured in runs.values() for m in measured),
    }


def _open(zoo: Any, sides: dict[str, Stepper], sizes: Sizes) -> tuple[float, dict[str, Any]]:
    """p95 of request latency over PM's, one arrival process for both, and the figures behind it."""
    work = {
        "models": sorted(zoo.served),
        "vocab_size": sizes.shape.vocab_size,
        "lengths": _lengths(sizes, sizes.open_output),
    }
    engines = {name: InlineEngine(side) for name, side in list(sides.items())[:2]}
    backlog = generate(**work, count=sizes.backlog, seed=999)
    capacity = measure(engines["pm"], backlog, sizes.in_flight).requests_per_second
    rate = sizes.overload * capacity
    arrivals = generate(**work, count=sizes.open_requests, seed=1000, rate=rate, popularity=None)
    detail: dict[str, Any] = {"rate": round(rate, 4), **describe(arrivals)}
    p95 = {}
    for name, engine in engines.items():
        measured = measure(engine, arrivals)
        p95[name] = percentile(measured.latencies_s, 95)
        detail[name] = measured.summary()
        progress(f"open loop, {name}: p95 {p95[name]:.2f} s, {measured.failed} failed")
    pm, main = p95
    return round(p95[main] / p95[pm], 4), detail


def _lengths(sizes: Sizes, output: int) -> Lengths:
    return Lengths(prompt=(sizes.prompt, sizes.prompt), output=(output, output))


def _config(sizes: Sizes) -> EngineConfig:
    length = -(-(sizes.prompt + sizes.output) // _PAGE) * _PAGE
    kv_bytes = 4 * sizes.shape.kv_floats_per_token
    return EngineConfig(
        max_num_seqs=sizes.in_flight,
        max_model_len=length,
        page_size=_PAGE,
        # Room for every sequence in flight, on both sides.
        kv_memory_mb=1 + sizes.in_flight * length * kv_bytes // 10**6,
        decode_sizes=sizes.decode_sizes,
        prefill_grids=tuple((n, sizes.prompt) for n in sizes.prefill_sizes),
    )
