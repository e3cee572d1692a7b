"""What being one of several costs an agent that has all blocks itself: its steps, and what it serves."""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.models import DEMO_3M, MODEL_250M, TINY, MemoryZoo, ModelShape, save
from bench.report import progress, spread
from bench.stepper import Stepper
from jblock.engine.api import Engine, Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.process.client import FACTORY, ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.engine.spans.port import LocalPort
from jblock.parallel.placement import SINGLE
from jblock.scheduler.cluster import Cluster

_TUNES, _ADAPTERS = 4, 8
_STREAMS = 24
_PROMPT = 16
_STEPS = 4
_SHAPES = {"demo": DEMO_3M, "250m": MODEL_250M}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--rounds", type=int, default=30, help="of each side, in turns")
    parser.add_argument("--tokens", type=int, default=32, help="of each of 24 streams")
    parser.add_argument(
        "--model",
        choices=_SHAPES,
        default="demo",
        help="the smaller, the more of a step is overhead",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`step_ratio`: a decode step of twelve tenants in a loop that is ready for spans of other agents, over
    one that is not. `serve_ratio`: time to serve them by a process behind the scheduler, over one without.
    `..._low` and `..._high`: of the 95% interval of the mean ratio."""
    shape = TINY if args.quick else _SHAPES[args.model]
    rounds, tokens = (3, 8) if args.quick else (args.rounds, args.tokens)
    zoo = _twelve_tenants(shape)
    steps, step_compiles = _steps(zoo, args.cache, rounds)
    served, serve_compiles = _served(zoo, args.cache, rounds, tokens)
    figures = {}
    for name, ratios in {"step": steps, "serve": served}.items():
        low, high = _interval(ratios)
        figures |= {
            f"{name}_ratio": round(statistics.median(ratios), 4),
            f"{name}_low": round(low, 4),
            f"{name}_high": round(high, 4),
        }
    return {
        "one_agent": figures,
        "detail": {"step": spread(steps), "serve": spread(served)},
        "compiles_on_serving_path": step_compiles + serve_compiles,
    }


def _twelve_tenants(shape: ModelShape) -> MemoryZoo:
    """Full fine-tunes whose last quarter of layers is their own, and adapters of two ranks on them."""
    zoo = MemoryZoo(shape)
    zoo.add_base("tune-0")
    for i in range(1, _TUNES):
        zoo.add_variant(f"tune-{i}", "tune-0", max(shape.layers // 4, 1))
    for i in range(_ADAPTERS):
        zoo.add_adapter(f"lora-{i}", f"tune-{i % _TUNES}", (8, 16)[i % 2])
    return zoo


def _steps(zoo: MemoryZoo, cache: Path, rounds: int) -> tuple[list[float], int]:
    """Ratios of step times, round by round, and how many programs were compiled for them."""
    length = 64 * -(-(_PROMPT + _STEPS * (rounds + 2) + 8) // 64)
    kv_bytes = 4 * _STREAMS * zoo.shape.kv_floats_per_token * length
    config = EngineConfig(
        max_num_seqs=_STREAMS,
        max_model_len=length,
        kv_memory_mb=8 + 2 * kv_bytes // 10**6,
        decode_sizes=(1, 8, _STREAMS),
        prefill_grids=((8, _PROMPT),),
    )
    ports: dict[int, LocalPort] = {}
    ports[0] = LocalPort(0, ports, SINGLE)
    sides = {
        name: Stepper(zoo, zoo.served, config, cache, port=port)
        for name, port in {"alone": None, "agent": ports[0]}.items()
    }
    tenants = sorted(zoo.served)
    models = [tenants[i % len(tenants)] for i in range(_STREAMS)]
    for side in sides.values():
        side.fill(models, _PROMPT, length - _PROMPT)
        side.steps(_STEPS, _STREAMS)

    def measure(name: str) -> float:
        return sides[name].steps(_STEPS, _STREAMS)

    ratios = _in_turns(measure, ("agent", "alone"), rounds)
    progress(f"steps: {spread(ratios)}")
    return ratios, sum(side.stats().compiles_on_serving_path for side in sides.values())


def _served(zoo: MemoryZoo, cache: Path, rounds: int, tokens: int) -> tuple[list[float], int]:
    """Ratios of times to serve all streams, round by round, and programs compiled meanwhile."""
    with tempfile.TemporaryDirectory(prefix="jblock-") as folder:
        kwargs: dict[str, Any] = {
            "zoo": str(save(zoo, Path(folder, "zoo"))),
            "executable_cache": str(cache),
            "kv_memory_mb": 400,
            "max_num_seqs": _STREAMS,
            "max_model_len": 256,
            "max_draft_tokens": 0,
        }

        def start(served: Sequence[str], **options: Any) -> ProcessEngine:
            own = {**kwargs, "models": list(served)} if served else kwargs
            return ProcessEngine(FACTORY, own, **options)

        def agent(index: int, served: Sequence[str], notify: Any) -> ProcessEngine:
            return start(served, notify=notify)

        engines: dict[str, Engine] = {}
        try:
            engines["alone"] = SupervisedEngine(start)
            engines["scheduler"] = Cluster(agent, 1)
            for engine in engines.values():
                engine.models()
                _warm(engine)
                _serve(engine, zoo, tokens)

            def measure(name: str) -> float:
                return _serve(engines[name], zoo, tokens)

            ratios = _in_turns(measure, ("scheduler", "alone"), rounds)
            progress(f"served: {spread(ratios)}")
            return ratios, sum(e.stats().compiles_on_serving_path for e in engines.values())
        finally:
            for engine in engines.values():
                engine.close()


def _in_turns(measure: Any, sides: tuple[str, str], rounds: int) -> list[float]:
    """The first side's time over the other's, each round in the other order."""
    ratios = []
    for number in range(rounds):
        order = sides if number % 2 else sides[::-1]
        times = {name: measure(name) for name in order}
        ratios.append(times[sides[0]] / times[sides[1]])
    return ratios


def _serve(engine: Engine, zoo: MemoryZoo, tokens: int) -> float:
    """Seconds in which all streams run to their length.

    Raises:
      RuntimeError: one ended otherwise.
    """
    tenants = sorted(zoo.served)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    begin, left = time.perf_counter(), _STREAMS
    for i in range(_STREAMS):
        # Other prompts every time would cost more or less prefill; these are found from the second time on.
        prompt = tuple((7 * i + j) % zoo.shape.vocab_size for j in range(_PROMPT))
        model = tenants[i % len(tenants)]
        engine.submit(Request(request_id=f"r{i}", model=model, token_ids=prompt, sampling=sampling))
    while left:
        for output in engine.poll(1.0):
            if output.finish_reason not in (None, "length"):
                raise RuntimeError(f"a request did not run to its length: {output}")
            left -= output.finish_reason is not None
    return time.perf_counter() - begin


def _warm(engine: Engine) -> None:
    """Waits until nothing was compiled for a second."""
    before = -1
    while before != (before := engine.stats().compiles_in_background):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            engine.poll(0.1)


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95% interval of their mean, by the normal distribution."""
    mean = statistics.fmean(ratios)
    error = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return mean - error, mean + error
