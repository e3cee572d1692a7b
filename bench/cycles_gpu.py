"""What ptxas says of the Hopper kernels, compiled for an H200 that is not here, and what plans say.

Registers, spills and warnings of every program, shared memory of a block, and how often the memory
warpgroup's threads arrive at barriers in one step of attention. Needs the extra `compile`; nothing is run.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from jblock import compile_matrix as matrix

# Attention of all models whose kernels differ; of the other ops what a server of this one runs most; --quick:
# of each op the first.
MODEL = "llama-3-8b"
OPS = ("paged_attention", "quantized_matmul", "grouped_block_matmul", "grouped_delta_matmul")

_MARK = "bench.cycles_gpu: "


def run(quick: bool) -> dict[str, Any]:
    """`h200`'s figures.

    Returns:
      spills: bytes of registers that ptxas spilled, all programs together.
      warnings: of ptxas.
      barrier_ops: the most arrivals of threads at barriers for the keys and values of one whole block.
      programs: by name registers, spills, warnings, and of attention shared_memory (bytes) and barrier_ops.
    """
    command = [sys.executable, "-m", "bench.cycles_gpu", *(["--quick"] if quick else [])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for an H200:\n{done.stderr[-2000:]}")
    programs = parse(done.stdout)
    return {
        "spills": sum(p["spills"] for p in programs.values()),
        "warnings": sum(p["warnings"] for p in programs.values()),
        "barrier_ops": max(p.get("barrier_ops", 0) for p in programs.values()),
        "programs": programs,
    }


def parse(output: str) -> dict[str, dict[str, int]]:
    """By program: what its plan says, and ptxas of the kernels that follow its name in the child's output.

    Raises:
      ValueError: ptxas said nothing of a program.
    """
    programs: dict[str, dict[str, int]] = {}
    for part in output.split(_MARK)[1:]:
        first, _, said = part.partition("\n")
        name, plan = json.loads(first)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
        if not registers:
            raise ValueError(f"ptxas said nothing of {name!r}: {said[:500]!r}")
        programs[name] = {
            "registers": max(registers),
            "spills": sum(map(int, re.findall(r"frame, (\d+) bytes spill stores", said))),
            "warnings": len(re.findall(r"ptxas warning", said)),
            **plan,
        }
    return programs


def _programs(quick: bool) -> Iterator[tuple[str, str, Any, Any]]:
    """op, name, function, arguments."""
    for op in OPS:
        shapes = importlib.import_module(f"jblock.pallas_kernels.{op}.shapes")
        chosen = tuple(m for m in shapes.MODELS if m.name == MODEL)
        if op == "paged_attention":
            chosen = shapes.DISTINCT
        for i, (name, function, arguments) in enumerate(shapes.programs("mosaic_gpu", chosen)):
            if not quick or i == 0:
                yield op, name, function, arguments


def _plan(op: str, function: Any, arguments: Any) -> dict[str, int]:
    """Shared memory and barrier arrivals of attention; other ops have none to show."""
    if op != "paged_attention":
        return {}
    import numpy as np

    from jblock.pallas_kernels.paged_attention import gpu_plan, mosaic_gpu

    q, k, _, pages, ragged = arguments
    plan = mosaic_gpu.plan_of(q, k, pages, ragged, **function.keywords)
    memory = [a for a in gpu_plan.scratch(plan).values() if hasattr(a, "dtype") and a.shape]
    return {
        "shared_memory": sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in memory),
        "barrier_ops": plan.barrier_ops,
    }


def main() -> None:
    """The child: compiles, and has ptxas say what it thinks into standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    os.dup2(1, 2)  # ptxas speaks on either
    from jblock.parallel.targets import Target

    with matrix.Checker(Target.parse("cuda:h200")) as checker:
        for op, name, function, arguments in _programs(quick):
            lower = matrix.lowering(op, checker.placement, function, arguments)
            print(_MARK + json.dumps([name, _plan(op, function, arguments)]), flush=True)
            lower().compile()


if __name__ == "__main__":
    main()
