"""The host's part of a step: an engine whose programs are empty, in a process of its own.

Run by the scenario `host` on the tree it is told to measure, ours or that of an earlier commit, so it
names nothing that has moved since f7143b4. It is told NAME and a size, then answers each line, a number of
steps, with a line of JSON.
"""

import dataclasses
import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from bench.models import MemoryZoo, ModelShape
from bench.stepper import ExecutableCache, Stepper, WatchedDevice
from jblock.engine.config import EngineConfig
from jblock.parallel.placement import Placement


class Dispatch:
    """Time inside calls of programs and transfers.

    Attributes:
      seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Any) -> Any:
        """The same call, its time counted."""

        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            self.seconds += time.perf_counter() - begin
            return result

        return run


DISPATCH = Dispatch()


class Lowered:
    """What `Executables` compiles: a program whose calls are timed."""

    def __init__(self, lowered: jax.stages.Lowered):
        self._lowered = lowered

    def compile(self) -> Any:
        """See jax."""
        return DISPATCH.timed(self._lowered.compile())


def lower(placement: Placement, function: Any, donate: Any, arguments: Any, outputs: Any) -> Any:
    """In place of `Placement.lower`: results are the donated arguments as they came, and ones elsewhere,
    which as tokens are finite."""
    wanted, tree = jax.tree.flatten(jax.eval_shape(function, *arguments))

    def empty(*args: Any) -> Any:
        donated = jax.tree.leaves([args[i] for i in donate])
        results = []
        for struct in wanted:
            same = (a for a in donated if (a.shape, a.dtype) == (struct.shape, struct.dtype))
            found = next(same, None)
            if found is None:
                found = jnp.ones(struct.shape, struct.dtype)
            else:
                donated = [a for a in donated if a is not found]
            results.append(found)
        return jax.tree.unflatten(tree, results)

    jitted = jax.jit(empty, donate_argnums=donate, keep_unused=True)
    return Lowered(jitted.lower(*arguments))


def seconds(device: Any, layer: Any, bucket: Any) -> float:
    """In place of `WatchedDevice.time_layer`: the same in every run, so that the same calls are made."""
    return 2e-5 * (1 + 0.02 * bucket.num_seqs * bucket.q_len)


class Scene:
    """Sequences in an engine, all of them as they are to be measured.

    Attributes:
      stepper: the engine.
    """

    def __init__(
        self, layers: int, tunes: int, rows: int, prompt: int, waiting: int = 0, **settings: Any
    ):
        """An engine without sequences.

        Args:
          layers: of each chain.
          tunes: chains, which share half of their layers.
          rows: sequences that decode.
          prompt: tokens of the prompt of each.
          waiting: sequences that wait for pages.
          **settings: of the engine.
        """
        zoo = MemoryZoo(dataclasses.replace(_SHAPE, layers=layers))
        self._names = ["tune-0"]
        zoo.add_variant("tune-0", "base", 0)
        for i in range(1, tunes):
            self._names.append(f"tune-{i}")
            zoo.add_variant(f"tune-{i}", "base", layers // 2)
        config = EngineConfig(
            max_num_seqs=max(64, rows),
            max_model_len=2048,
            kv_memory_mb=400,
            host_kv_memory_mb=0,
            prefill_grids=((1, 64),),
            **settings,
        )
        self._rows, self._prompt, self._waiting = rows, prompt, waiting
        self._open: list[str] = []
        chains = {name: zoo.chain(name) for name in self._names}
        with tempfile.TemporaryDirectory() as folder:
            self.stepper = Stepper(zoo, chains, config, Path(folder, "programs"))
        # As on an accelerator: where small arrays are transferred before a call, they are here too.
        for owner in (self.stepper.device, getattr(self.stepper.device, "state", None)):
            if hasattr(owner, "_on_host"):
                owner._on_host = False

    def turn(self, steps: int) -> dict[str, float]:
        """Milliseconds of a step: of the loop's thread, by the clock, and in calls and transfers."""
        stepper, names = self.stepper, self._names
        stepper.drain(self._open)
        self._open = stepper.fill(
            [names[i % len(names)] for i in range(self._rows)], self._prompt, 1000
        )
        for _ in range(self._waiting):
            self._open.append(stepper.submit(names[0], stepper.prompt(names[0], 1000), 100))
        for _ in range(steps // 4):
            stepper.loop.step()
        stepper.device.mark()
        gc.collect()
        gc.disable()
        DISPATCH.seconds, wall, cpu = 0.0, time.perf_counter(), time.thread_time()
        for _ in range(steps):
            stepper.loop.step()
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        gc.enable()
        if threading.active_count() > 1:
            raise RuntimeError(f"not all of the host's work is measured: {threading.enumerate()}")
        figures = {"ms": cpu, "wall_ms": wall, "dispatch_ms": DISPATCH.seconds}
        return {name: seconds / steps * 1e3 for name, seconds in figures.items()}


_SHAPE = ModelShape(
    layers=32,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
)
_SIZES = (1, 8, 32, 64)
SCENES: dict[str, dict[str, Any]] = {
    "one_chain_b64": {"layers": 32, "tunes": 1, "rows": 64, "prompt": 64, "decode_sizes": _SIZES},
    "one_chain_b256": {
        "layers": 32,
        "tunes": 1,
        "rows": 256,
        "prompt": 64,
        "decode_sizes": (1, 64, 256),
    },
    "finetunes_8x32_b64": {
        "layers": 32,
        "tunes": 8,
        "rows": 64,
        "prompt": 64,
        "decode_sizes": _SIZES,
    },
    "exhausted_200": {
        "layers": 2,
        "tunes": 1,
        "rows": 4,
        "prompt": 900,
        "waiting": 200,
        "kv_pages": 70,
        "decode_sizes": (1, 8, 64),
    },
}


def main(name: str, quick: bool) -> None:
    """Answers each line, a number of steps, with a line of JSON."""
    settings = SCENES[name]
    if quick:
        settings |= {"layers": 2, "tunes": min(settings["tunes"], 2), "rows": 4}
    Placement.lower, Placement.put = lower, DISPATCH.timed(Placement.put)
    ExecutableCache.load, ExecutableCache.store = (lambda *args: None), (lambda *args: None)
    WatchedDevice.time_layer = seconds
    scene = Scene(**settings)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(scene.turn(int(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "quick")
