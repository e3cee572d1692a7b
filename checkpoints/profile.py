"""`jblock convert profile`: measures what the blocks of a zoo take on this machine, and keeps it there.

The only command that runs a model, and so the only one that imports the engine. The times are those of the
engine's own profile (`jblock/engine/runner/latency_profile.py`), which finds them measured when it starts.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.progress import Progress
from jblock.zoo import disk, latency_profiles
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

_CALLS = 200


def profile(
    zoo_path: str | Path, names: Sequence[str], programs: Path | None, progress: Progress
) -> dict[str, Any]:
    """Measures every signature of some models, and writes `profiles/<target>/profile.json`.

    Args:
      zoo_path: the zoo.
      names: models; empty: all.
      programs: folder of compiled programs; None: the user's own, which `jblock-serve` uses.
      progress: told how far it is.

    Returns:
      The profile as plain JSON, with `target`. See `zoo.profiles.Profile`. Times are of calls without
      cached tokens (`context` 0).

    Raises:
      ZooError: no such model.
      ValueError: a model the engine cannot run.
    """
    from jblock.engine.config import EngineConfig
    from jblock.engine.graph.build import assemble
    from jblock.engine.graph.graph import Layer
    from jblock.engine.programs import executable_cache
    from jblock.engine.runner.latency_profile import Profile
    from jblock.engine.runner.runner import Runner
    from jblock.engine.weights.loader import Loads, weights_of

    zoo = Zoo.open(zoo_path)
    chains = {}
    for name in names or zoo.chains():
        try:
            chains[name] = zoo.checked_chain(name)
        except ZooError as e:
            if names:
                raise
            progress.note(f"{name} is left out: {e}")
    if not chains:
        raise ZooError(f"{zoo.path} has no models to measure: convert one first")
    config = EngineConfig(max_num_seqs=16, decode_sizes=(1, 4, 16), max_model_len=512)
    graph = assemble(zoo, chains, config)
    Loads(graph.zoo, graph.placement, graph.resident_set, config).preload(
        weights_of(graph.resident_set)
    )
    cache = executable_cache.ExecutableCache(programs or executable_cache.default_folder())
    device = Runner(graph, config, cache)
    progress.note("compiling")
    device.executables.warm(
        device.program_keys(graph, device.buckets, greedy_only=True), config.compile_workers
    )
    measured = Profile(device)
    measured.prepare(graph.instances)
    progress.note("measuring")
    while not measured.complete:
        measured.measure_one()
    load = _load_seconds(zoo, {s.component for c in chains.values() for s in c.steps})
    units: dict[str, Layer] = {}
    for instance in graph.instances:
        for unit in instance.layers:
            units.setdefault(unit.signature.key(), unit)
    rows: list[dict[str, Any]] = []
    for unit in units.values():
        times = [
            {"num_seqs": b.num_seqs, "q_len": b.q_len, "context": 0, "seconds": s}
            for b in device.buckets
            if (s := measured.layer_seconds(unit, b)) is not None
        ]
        rows.append(
            {
                "signature": unit.signature.name,
                "key": unit.signature.key(),
                "bytes": sum(a.nbytes for part in unit.params for a in part.values()),
                "load_seconds": sum(load[repr(spec)] for spec in unit.signature.specs),
                "times": times,
            }
        )
    hop = _hop_seconds()
    layers = [r for r in rows if r["signature"].startswith(("layer", "attention", "ffn"))] or rows
    largest = max(layers, key=lambda r: r["bytes"])
    alone = next(t["seconds"] for t in largest["times"] if (t["num_seqs"], t["q_len"]) == (1, 1))
    found = latency_profiles.Profile(
        hop_seconds=hop,
        bytes_per_second=largest["bytes"] / alone,
        signatures=tuple(rows),
    )
    target = latency_profiles.target()
    data = dataclasses.asdict(found)
    # Of this machine, so it is kept where its readers are: beside a bucket's local copies too.
    with disk.disk_errors(zoo.path):
        folder = zoo.path / "profiles" / target
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(folder / "profile.json", json.dumps(data).encode(), folder)
    return {"target": target, **data}


def _load_seconds(zoo: Zoo, components: set[str]) -> dict[str, float]:
    """Spec -> seconds to read a component of it from the zoo; the least of all there are."""
    seconds: dict[str, float] = {}
    for id_ in sorted(components):
        begin = time.perf_counter()
        zoo.load_component(id_)
        took = time.perf_counter() - begin
        spec = repr(zoo.component(id_).spec)
        seconds[spec] = min(took, seconds.get(spec, took))
    return seconds


def _hop_seconds() -> float:
    """One call of a compiled program that does next to nothing, registers donated as a block's are."""
    import jax
    import jax.numpy as jnp

    rows = jnp.zeros((64, 64), jnp.float32)
    call = jax.jit(lambda r, i: r.at[i].add(1.0), donate_argnums=0)
    index = jnp.zeros((4,), jnp.int32)
    compiled = call.lower(rows, index).compile()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(_CALLS):
            rows = compiled(rows, index)
        jax.block_until_ready(rows)
        best = min(best, (time.perf_counter() - begin) / _CALLS)
    return best
