"""What the host does for a step, the device's work taken out, over the same of an earlier commit."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.report import progress, spread

_SCENES = ("one_chain_b64", "one_chain_b256", "finetunes_8x32_b64", "exhausted_200")
_HERE = Path(__file__).parents[2]
_FIGURES = ("ms", "wall_ms", "dispatch_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument(
        "--before",
        type=Path,
        help="tree of an earlier commit, from f7143b4 on, to measure in turns",
    )
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--only", choices=_SCENES, nargs="+", default=_SCENES)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every scene in a process of each tree, which take turns."""
    turns, steps = (2, 8) if args.quick else (args.turns, 60)
    return {"host": {name: _measure(name, args, turns, steps) for name in args.only}}


def _measure(name: str, args: argparse.Namespace, turns: int, steps: int) -> dict[str, Any]:
    trees = {"after": _HERE} | ({"before": args.before} if args.before else {})
    children = {side: _Child(tree, name, quick=args.quick) for side, tree in trees.items()}
    try:
        sides: dict[str, list[dict[str, float]]] = {side: [] for side in children}
        order = list(children)
        for _ in range(turns):
            order.reverse()
            for side in order:
                sides[side].append(children[side].turn(steps))
    finally:
        for child in children.values():
            child.close()
    figures = {
        side: {f: spread([turn[f] for turn in taken]) for f in _FIGURES}
        for side, taken in sides.items()
    }
    found = {f: figures["after"][f]["median"] for f in _FIGURES} | {"detail": figures}
    if args.before:
        pairs = zip(sides["after"], sides["before"], strict=True)
        ratios = [after["ms"] / before["ms"] for after, before in pairs]
        found |= {"over_before": round(statistics.median(ratios), 4), "ratios": spread(ratios)}
    progress(f"{name}: {found}")
    return found


class _Child:
    """One tree's engine, in a process that waits for its turns."""

    def __init__(self, tree: Path, name: str, *, quick: bool):
        """Raises RuntimeError if it cannot be built."""
        script = _HERE / "bench" / "host_child.py"
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, name, "quick" if quick else "full"],
            env=os.environ | {"PYTHONPATH": str(tree.resolve()), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def turn(self, steps: int) -> dict[str, float]:
        """Milliseconds of a step of its loop's thread, by the clock, and in calls of programs."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that was measured ended with {self._process.wait()}")
        return line
