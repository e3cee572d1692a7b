"""From process start to the first token and to the last program, with and without compiled programs."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo, save
from bench.report import median, progress, spread
from jblock.engine.config import DTYPES

_TIMEOUT_S = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of starts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`cached_ratio`: process start until every program is there, with a full cache over an empty one.
    `first_token_*_s`: process start to the first token, less the time of reading the weights."""
    rounds = 1 if args.quick else args.rounds
    zoo = MemoryZoo(TINY if args.quick else MODEL_250M)
    zoo.add_base("base")
    starts: dict[str, list[dict[str, Any]]] = {"empty": [], "full": []}
    with tempfile.TemporaryDirectory() as folder:
        path = save(zoo, Path(folder, "zoo"))
        for i in range(rounds):
            cache = Path(folder, "programs")
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("empty", "full"):
                start = _start(path, cache, args.dtype, args.quick)
                starts[name].append(start)
                progress(
                    f"start {i}, {name} cache: first token {start['first_token_s']:.2f} s (reading "
                    f"{start['reading_s']:.2f}), all {start['programs']} programs "
                    f"{start['settled_s']:.2f} s"
                )
    ratios = [
        full["settled_s"] / empty["settled_s"]
        for full, empty in zip(starts["full"], starts["empty"], strict=True)
    ]
    beyond = {
        name: statistics.median(s["first_token_s"] - s["reading_s"] for s in each)
        for name, each in starts.items()
    }
    return {
        "coldstart": {
            "cached_ratio": median(ratios),
            "first_token_full_s": round(beyond["full"], 3),
            "first_token_empty_s": round(beyond["empty"], 3),
        },
        "dtype": args.dtype,
        "detail": {
            "ratio": spread(ratios),
            **{
                name: {key: spread([s[key] for s in each], 3) for key in each[0]}
                for name, each in starts.items()
            },
        },
        "compiles_on_serving_path": sum(
            s["compiles_on_serving_path"] for each in starts.values() for s in each
        ),
    }


def _start(zoo: Path, cache: Path, dtype: str, quick: bool) -> dict[str, Any]:
    """One start in a process of its own; see bench/coldstart_child.py for its figures."""
    command = [sys.executable, "-m", "bench.coldstart_child", str(zoo), str(cache), dtype]
    begin = time.time()
    done = subprocess.run(
        [*command, str(begin), "quick" if quick else "full"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(
            f"the started engine ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
