"""A decode step through blocks, as a user gets it, over the same step as one fused XLA program."""

import argparse
import statistics
from typing import Any

from bench.fused import FusedDecode
from bench.models import DEMO_3M, MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.report import median, progress, spread
from bench.stepper import Stepper
from jblock.engine.config import DTYPES, EngineConfig

_PROMPT = 16
_PAGE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved repetitions")
    parser.add_argument("--only", choices=("250m", "demo"), help="one of the two models only")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios `b1`, `b8`, `b32` on the 250M model, and `demo`: the worst of the three on the demo
    base."""
    tax: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    compiles = 0
    cases = {"250m": (MODEL_250M, 2), "demo": (DEMO_3M, 8)}
    for case, (shape, steps) in cases.items():
        if args.only not in (None, case):
            continue
        shape = TINY if args.quick else shape
        figures, detail[case], count = measure(shape, args, steps)
        compiles += count
        if case == "250m":
            tax |= {f"b{n}": ratio for n, ratio in figures.items()}
        if case == "demo" or args.quick:
            tax["demo"] = max(figures.values())
        if args.quick:
            break  # The tiny model stands for both.
    return {
        "block_tax": tax,
        "dtype": args.dtype,
        "detail": detail,
        "compiles_on_serving_path": compiles,
    }


def measure(
    shape: ModelShape,
    args: argparse.Namespace,
    steps: int,
    sizes: tuple[int, ...] = (1, 8, 32),
    kv_dtype: str = "float32",
) -> tuple[dict[int, float], dict[str, Any], int]:
    """Median ratio by batch size, its spread and both step times, and compiles while serving.

    Blocks and fused program take turns, `steps` steps at a time, each round in the other order; a
    round starts and ends with an idle device. Both are at the same position of their sequences.
    """
    rounds = 2 if args.quick else args.rounds
    # Warm-up, the rounds, and the lone steps.
    decoded = steps * (rounds + 1) + rounds + 8
    length = -(-(_PROMPT + decoded) // _PAGE) * _PAGE
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=max(sizes),
        max_model_len=length,
        page_size=_PAGE,
        kv_dtype=kv_dtype,
        kv_memory_mb=1 + 4 * max(sizes) * shape.kv_floats_per_token * length // 10**6,
        decode_sizes=sizes,
        prefill_grids=((8, _PROMPT),),
    )
    progress(f"loading and compiling a model of {shape.layers} layers, d {shape.hidden_size}")
    stepper = Stepper(zoo, zoo.served, config, args.cache)
    ratios, detail = {}, {}
    for n in sizes:
        fused = FusedDecode(stepper.graph.routes["base"], n, _PAGE, length, kv_dtype)
        ids = stepper.fill(["base"] * n, _PROMPT, decoded + 4)
        fused.position = _PROMPT
        stepper.steps(steps, n), fused.steps(steps)
        ours, theirs, lone = [], [], []
        for i in range(rounds):
            for side in ("blocks", "fused") if i % 2 else ("fused", "blocks"):
                if side == "blocks":
                    ours.append(stepper.steps(steps, n) / steps * 1e3)
                else:
                    theirs.append(fused.steps(steps) / steps * 1e3)
            lone.append((*stepper.lone_step(), *fused.lone_step()))
        stepper.drain(ids)
        ratio = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratios[n] = median(ratio)
        middle = [statistics.median(column) for column in zip(*lone, strict=True)]
        detail[f"b{n}"] = {
            "ratio": spread(ratio),
            "ratio_of_minima": round(min(ours) / min(theirs), 4),
            "blocks_ms": spread(ours, 3),
            "fused_ms": spread(theirs, 3),
            "blocks_alone_ms": {
                "enqueue": round(middle[0] * 1e3, 3),
                "ready": round(middle[1] * 1e3, 3),
                "block_calls": int(middle[2]),
            },
            "fused_alone_ms": {
                "enqueue": round(middle[3] * 1e3, 3),
                "ready": round(middle[4] * 1e3, 3),
            },
        }
        progress(
            f"batch {n}: {median(ours, 2)} ms through blocks, {median(theirs, 2)} ms fused, "
            f"ratio {ratios[n]}"
        )
    return ratios, detail, stepper.stats().compiles_on_serving_path
