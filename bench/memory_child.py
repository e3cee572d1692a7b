"""Bytes of an engine in a process of its own.

Run by the scenario `memory` on the tree it is told to measure, ours or that of an earlier commit, so it names
nothing that has moved since f7143b4, or both. `write ZOO SIZE` makes the models; `serve ZOO SIZE MODELS
SLOTS KV_MB CACHE` serves them, asks each for a few tokens, and prints a line of JSON.
"""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from bench.models import MemoryZoo, ModelShape, save
from jblock.blocks import compressed_spec
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

# SmolLM2-135M's, and a small one.
SHAPES = {
    "full": (30, 576, 1536, 9, 3, 64, 49152),
    "quick": (4, 64, 128, 4, 2, 16, 256),
}
FIELDS = ("layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
TUNES, COMPRESSED = 6, 2
# As it was called at f7143b4.
_BITS: Any = getattr(compressed_spec, "BitsSpec", None) or compressed_spec.BitDeltaSpec


def write(folder: Path, size: str) -> None:
    """A base, fine-tunes of its last layers, and compressed copies as two of them would have."""
    fields = dict(zip((*FIELDS, "vocab_size"), SHAPES[size], strict=True))
    shape = ModelShape(**fields, tied=True)
    own = max(shape.layers // 5, 1)
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    for i in range(TUNES):
        zoo.add_variant(f"tune-{i}", "base", own)
    save(zoo, folder)
    store = Zoo.open(folder)
    base, rng = store.chain("base"), np.random.default_rng(0)
    for i in range(COMPRESSED):
        steps = []
        for at, step in enumerate(base.steps):
            deltas: tuple[str, ...] = ()
            if 2 * (shape.layers - own) < at <= 2 * shape.layers:
                deltas = (_compressed(store, step.component, at, rng),)
            steps.append(Step(component=step.component, deltas=deltas))
        derived = {"chain": f"tune-{i}@1", "command": "compress"}
        changed: dict[str, Any] = {
            "name": f"small-{i}",
            "version": 0,
            "policy": "near",
            "derived": derived,
        }
        store.publish(dataclasses.replace(base, steps=tuple(steps), **changed))


def _compressed(store: Zoo, component: str, at: int, rng: np.random.Generator) -> str:
    """A delta such as `compress` chooses: of low rank, of two bits or of four."""
    base = store.component(component).spec
    names = ("q", "k", "v", "o") if base.kind == "attention" else ("gate", "up", "down")
    spec: Any
    if at % 3 == 0:
        spec = compressed_spec.LowRankSpec(targets=dict.fromkeys(names, 32))
    else:
        bits = 2 * (at % 3)
        target = compressed_spec.BitsTarget(bits=bits, group=64)
        spec = _BITS(targets=dict.fromkeys(names, target))
    tensors = {}
    for name, shape in spec.tensors(base).items():
        dtype = np.dtype(spec.dtype(name))
        if dtype.kind == "f":
            tensors[name] = np.full(shape, 1e-3, dtype)
        else:
            tensors[name] = rng.integers(0, 127, shape).astype(dtype)
    return store.put_delta(spec, component, tensors)


def serve(zoo: str, size: str, models: str, slots: str, kv_mb: str, cache: str, dtype: str) -> None:
    """Prints resident bytes of this process with all models served and used."""
    from jblock.engine.api import Request, SamplingParams

    engine = _build_engine()(
        zoo=zoo,
        models=models.split(","),
        adapter_slots=int(slots),
        kv_memory_mb=int(kv_mb),
        max_model_len=256,
        executable_cache=cache,
        dtype=dtype,
        decode_sizes=(1, 8),
        prefill_grids=((1, 64),),
        max_num_seqs=8,
    )
    for model in models.split(","):
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        tokens = tuple(range(1, 33))
        engine.submit(Request(request_id=model, model=model, token_ids=tokens, sampling=sampling))
    open_ids = set(models.split(","))
    while open_ids:
        for output in engine.poll(1.0):
            if output.error_message:
                raise RuntimeError(output.error_message)
            open_ids -= {output.request_id} if output.finish_reason else set()
    (getattr(engine, "wait_until_warm", None) or engine.settle)()
    stats = engine.stats()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    store = Zoo.open(zoo)
    steps = [step for model in models.split(",") for step in store.chain(model).steps]
    item = 4 if dtype == "float32" else 2
    records = [store.component(c).tensors for c in {step.component for step in steps}]
    weights = sum(item * int(np.prod(t.shape)) for own in records for t in own.values())
    print(
        json.dumps(
            {
                "rss_mb": int(status["VmRSS"].split()[0]) / 1e3,
                "peak_mb": int(status["VmHWM"].split()[0]) / 1e3,
                "held_mb": stats.resident_bytes / 1e6,
                "weights_mb": weights / 1e6,
                "compiles_on_serving_path": stats.compiles_on_serving_path,
            }
        ),
        flush=True,
    )
    engine.close()


def _build_engine() -> Any:
    for name in ("jblock.engine.factory", "jblock.engine.agent"):
        try:
            return importlib.import_module(name).build_engine
        except ModuleNotFoundError:
            continue
    raise RuntimeError("this tree has no build_engine where one is known")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), sys.argv[3])
    else:
        serve(*sys.argv[2:])
