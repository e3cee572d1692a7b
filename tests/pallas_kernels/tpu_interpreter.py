"""jax's TPU interpreter as the tests use it: copies as late as may be, memory nobody wrote full of NaN, races
detected; and a mistake of its own mended.

jax (0.10 to 0.12) pads an array whose last block sticks out, and forgets to cut the result to its size again
where it is an input updated in place: a program that no verifier accepts. `sized` cuts it. What is behind
the array's end stays NaN in the interpreter's memory, as it is for the others.
"""

import functools
import gc
from pathlib import Path
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

# Of 65,530 that Linux allows by default; the compilation that needs one more ends the process.
MOST_MAPPINGS = 20_000
INTERPRET = pltpu.InterpretParams(detect_races=True)
RACE = "RACE DETECTED"
FAST = {"xla_backend_optimization_level": 0}
"""Compiler options for interpreted programs, which take far longer to compile than to run."""


def sized(interpret: Any) -> Any:
    """The interpreter, its results cut to the sizes of the call's."""

    @functools.wraps(interpret)
    def run(*args: Any, out_avals: Any, **options: Any) -> list[Any]:
        results = interpret(*args, out_avals=out_avals, **options)
        return [
            r[tuple(map(slice, a.shape))] if r.shape != a.shape else r
            for r, a in zip(results, out_avals, strict=True)
        ]

    return run


interpreter.interpret_pallas_call = sized(interpreter.interpret_pallas_call)


def bound_mappings() -> None:
    """Drops all compiled programs when they take many mappings of memory, an interpreted kernel hundreds."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
