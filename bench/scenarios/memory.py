"""Resident bytes of an engine's process, over an earlier commit's."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import progress
from jblock.engine.config import DTYPES

_HERE = Path(__file__).parents[2]
_CHILD = _HERE / "bench" / "memory_child.py"
_TUNES = tuple(f"tune-{i}" for i in range(6))
_SETS = {
    "one": ("base",),
    "seven": ("base", *_TUNES),
    "five": ("base", "tune-0", "tune-1", "small-0", "small-1"),
}
_SLOTS = 32  # the default
_TIMEOUT_S = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument(
        "--before", type=Path, help="tree of an earlier commit, from f7143b4 on, to measure too"
    )
    parser.add_argument("--only", choices=_SETS, nargs="+", default=tuple(_SETS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--kv_memory_mb", type=int, default=200)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Of each set of models: `rss_mb` of the process, `weights_mb` in the served dtype, and `constant_mb`,
    what is left of it beside 1.15 of these and the KV."""
    size, kv_mb = ("quick", 4) if args.quick else ("full", args.kv_memory_mb)
    trees = {"after": _HERE} | ({"before": args.before} if args.before else {})
    found: dict[str, Any] = {name: {} for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        for side, tree in trees.items():
            zoo, cache = f"{folder}/{side}", f"{args.cache}-{side}"
            _child(tree, "write", zoo, size)
            for name in args.only:
                models = ",".join(_SETS[name])
                told = _child(
                    tree, "serve", zoo, size, models, str(_SLOTS), str(kv_mb), cache, args.dtype
                )
                figures = {key: round(value, 1) for key, value in json.loads(told).items()}
                beside = 1.15 * figures["weights_mb"] + kv_mb
                figures["constant_mb"] = round(figures["rss_mb"] - beside, 1)
                progress(f"{name}, {side}: {figures}")
                found[name][side] = figures
    compiles = sum(figures["after"].pop("compiles_on_serving_path") for figures in found.values())
    measured = {"kv_mb": kv_mb, "dtype": args.dtype, "compiles_on_serving_path": int(compiles)}
    return {"memory": found, **measured}


def _child(tree: Path, *words: str) -> str:
    """The last line that a child says, on a tree.

    Raises:
      RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-P", _CHILD, *words],
        env=os.environ | {"PYTHONPATH": str(tree.resolve()), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]
