"""Prints XLA flags with which small programs compile in half the time, those that this jaxlib knows.

A flag that it does not know would abort whatever computes.
"""

import os
import subprocess
import sys

# No optimizer of LLVM; loops from XLA's own instructions, not by MLIR; one thread a program, for tests run
# beside each other.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known(flags: tuple[str, ...]) -> bool:
    """Whether jax computes with these."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(program, env=env, stderr=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    print(*(FLAGS if known(FLAGS) else [flag for flag in FLAGS if known((flag,))]))
