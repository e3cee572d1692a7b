"""Runs of agents over meshes of fake CPU devices, for test_sharded.py. jax fixes its devices when it starts,
so this is a process of its own: `python sharded_runs.py FOLDER [SET] MESH...` (of CHAINS) prints JSON."""

import collections
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
import fake_devices  # noqa: E402

os.environ["XLA_FLAGS"] = fake_devices.flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from harness import (  # noqa: E402
    FIXTURES,
    Agent,
    base_of,
    collect_tokens,
    oracle,
    request,
    shared_programs,
)

from checkpoints import hf, peft  # noqa: E402
from checkpoints.progress import Progress  # noqa: E402
from jblock.adapt.quantization import quantize_chain  # noqa: E402
from jblock.blocks.quant_spec import QuantSpec  # noqa: E402
from jblock.engine.config import EngineConfig  # noqa: E402
from jblock.engine.engine import ThreadEngine  # noqa: E402
from jblock.engine.groups.pipeline import PipelineEngine  # noqa: E402
from jblock.engine.groups.replicas import DataParallelEngine  # noqa: E402
from jblock.engine.kv_cache import free_memory  # noqa: E402
from jblock.engine.runner.runner import Runner  # noqa: E402
from jblock.zoo.store import Zoo  # noqa: E402

ADAPTER = "demo-1m-largest-lora12"
# Besides the demo family, what it has not: one KV head, biases, query and key norms, experts.
SOME = (
    "demo-1m",
    "demo-3m-sort",
    ADAPTER,
    "demo-1m-int4",
    "qwen2_bias",
    "qwen3_qknorm",
    "qwen3_lora_all_r8",
    "mixtral",
)
ALL = (
    *("demo-1m", "demo-1m-int4", "demo-1m-add", "demo-1m-spell", "demo-1m-upper"),
    *("demo-3m", "demo-3m-date", "demo-3m-find", "demo-3m-sort"),
    *(ADAPTER, "demo-3m-reverse-lora8", "demo-3m-next-lora16"),
    *("llama_gqa_untied", "llama_mha_tied", "qwen2_bias", "qwen3_qknorm", "mistral_window"),
    *("mixtral", "qwen2_moe", "gemma3"),
    *("lora_all_r8", "qwen3_lora_all_r8"),
)
KV_BYTES = 10**6
CHAINS = {
    "groups": ("demo-1m", ADAPTER),
    "mixed groups": ("demo-1m", ADAPTER, "mixtral"),
    "all": ALL,
    "experts": ("demo-1m", "mixtral", "qwen2_moe"),
    "bottleneck": ("llama_gqa_untied", "bn_houlsby"),
}


def settings(mesh: str) -> EngineConfig:
    """One grid to decode and one to prefill: prompts of several chunks, sequences side by side."""
    return EngineConfig(
        max_num_seqs=8,
        max_model_len=128,
        page_size=16,
        decode_sizes=(8,),
        prefill_grids=((8, 16),),
        kv_memory_mb=16,
        mesh=mesh,
    )


def convert(path: Path, name: str) -> None:
    """Puts a chain of the demo family or of the fixtures into a zoo, and what it needs."""
    quiet, demo = Progress(False), name.startswith("demo")
    if name == "demo-1m-int4":
        store = Zoo.open(path)
        quantize_chain(store, store.chain("demo-1m"), name, QuantSpec(bits=4, group=16))
        return
    if (delta := FIXTURES / "deltas" / name).exists():
        peft.convert(delta, path, "llama_gqa_untied", name, quiet)
        return
    root = ROOT / "examples" if demo else FIXTURES
    if (adapter := root / ("adapters" if demo else "peft") / name).exists():
        base = name[:7] if demo else base_of(name)
        peft.convert(adapter, path, base, name, quiet)
    else:
        hf.convert(root / ("models" if demo else "hf") / name, path, name, quiet)


def prompt_of(name: str) -> list[int]:
    """41 tokens: two chunks and a part."""
    if name.startswith("demo"):
        return [5 + 7 * i % 120 for i in range(41)]
    delta = (FIXTURES / "deltas" / name).exists()
    return oracle("llama_gqa_untied" if delta else name)["prompt"][:41].tolist()


def collectives(agent: Agent) -> dict[str, dict[str, int]]:
    """What the compiled programs send between devices: name -> collective -> count."""
    operation = re.compile(
        r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
        r"(?:-start)?\("
    )
    table = agent.device.executables._table
    return {k.name: collections.Counter(operation.findall(p.as_text())) for k, p in table.items()}


def swap_experts(zoo: Path, mesh: str) -> list[int]:
    """Tokens of a mixture that was taken away and brought back while another model was served."""
    store = Zoo.open(zoo)
    names = ["mixtral", "demo-1m"]
    chains = {n: store.chain(n) for n in names}
    engine = ThreadEngine(store, chains, settings(mesh), shared_programs())
    try:
        for served in (["demo-1m"], names):
            engine.serve(served)
        engine.submit(request("r", "mixtral", prompt_of("mixtral"), max_tokens=24))
        tokens = collect_tokens(engine, ["r"])["r"]
        assert engine.stats().compiles_on_serving_path == 0
        return tokens
    finally:
        engine.close()


def groups(zoo: Path, names: Sequence[str], mesh: str) -> dict:
    """Tokens of every chain from every data parallel group, before and after a change of what is served;
    and how many requests each group was given."""
    store = Zoo.open(zoo)
    chains = {n: store.chain(n) for n in names}
    engine = DataParallelEngine(store, chains, settings(mesh), shared_programs())
    given: list[list[str]] = [[] for _ in engine._engines]
    for inner, ids in zip(engine._engines, given, strict=True):
        submit = inner.submit
        inner.submit = lambda r, s=submit, ids=ids: (ids.append(r.request_id), s(r))
    tokens = {}
    try:
        for change in ("", "again "):
            if change:
                engine.serve(names[:1])
                engine.serve(names)
            ids = {f"{change}{n} {copy}": n for n in names for copy in range(len(given))}
            for request_id, name in ids.items():
                engine.submit(request(request_id, name, prompt_of(name), max_tokens=24))
            tokens |= collect_tokens(engine, list(ids))
        assert engine.stats().compiles_on_serving_path == 0
        assert engine.stats().running == engine.stats().waiting == 0
    finally:
        engine.close()
    return {"tokens": tokens, "given": given}


def pipeline(zoo: Path, names: Sequence[str], mesh: str) -> dict:
    """Tokens of every chain from agents with a span of each, before and after a change of what is served."""
    store = Zoo.open(zoo)
    engine = PipelineEngine(store, {n: store.chain(n) for n in names}, settings(mesh))
    tokens = {}
    try:
        for change in ("", "again "):
            if change:
                engine.serve(names[:1])
                engine.serve(names)
            ids = {f"{change}{n} 0": n for n in names}
            for request_id, name in ids.items():
                engine.submit(request(request_id, name, prompt_of(name), max_tokens=24))
            tokens |= collect_tokens(engine, list(ids))
        stats = engine.stats()
        assert stats.compiles_on_serving_path == stats.running == stats.waiting == 0
        assert stats.cached_tokens > 0
    finally:
        engine.close()
    return {"tokens": tokens, "given": [list(tokens)]}


def run(zoo: Path, names: Sequence[str], mesh: str) -> dict:
    """Greedy tokens and logits of every chain, all together on one mesh."""
    agent = Agent.make(zoo, names, settings(mesh))
    tokens = agent.generate({n: (n, np.array(prompt_of(n))) for n in names}, max_tokens=24)
    logits: dict[str, dict[int, list[float]]] = {n: {} for n in names}
    for batch, rows in agent.device.seen:
        for row, item in zip(rows, batch.items, strict=False):
            if item.samples:
                name = item.sequence.request.request_id
                logits[name].setdefault(item.start + item.q_len, row.tolist())
    return {
        "tokens": tokens,
        "logits": logits,
        "collectives": collectives(agent),
        "kv_bytes": kv_bytes(agent),
    }


def kv_bytes(agent: Agent) -> list[int]:
    """What the KV pools take of each device where every device has KV_BYTES for them."""
    config = dataclasses.replace(agent.device.config, kv_memory_mb=0)
    with (
        mock.patch.object(free_memory, "kv_budget", lambda devices: KV_BYTES),
        mock.patch.object(Runner, "_workspace", lambda *_: 0),
    ):
        device = Runner(agent.graph, config, agent.device.executables.cache)
    taken: dict[int, int] = collections.Counter()
    for leaf in jax.tree.leaves(device.state.pools):
        for shard in leaf.addressable_shards:
            taken[shard.device.id] += shard.data.nbytes
    return list(taken.values())


def swap(zoo: Path, mesh: str) -> list[int]:
    """Tokens of a chain that is served after two changes of what is served."""
    store = Zoo.open(zoo)
    chains = {"demo-1m": store.chain("demo-1m")}
    engine = ThreadEngine(store, chains, settings(mesh), shared_programs())
    try:
        for names in (["demo-1m", ADAPTER], [ADAPTER]):
            engine.serve(names)
        engine.submit(request("r", names[0], prompt_of(names[0]), max_tokens=24))
        tokens = collect_tokens(engine, ["r"])["r"]
        assert engine.stats().compiles_on_serving_path == 0
        return tokens
    finally:
        engine.close()


if __name__ == "__main__":
    folder, *meshes = sys.argv[1:]
    chains = SOME
    if meshes[0] in CHAINS:
        chains, meshes = CHAINS[meshes[0]], meshes[1:]
    zoo = Path(folder) / "zoo"
    for chain in chains:
        convert(zoo, chain)
    plain = [mesh for mesh in meshes if "dp" not in mesh and "pp" not in mesh]
    out = {mesh: run(zoo, chains, mesh) for mesh in ("", *plain)}
    out |= {mesh: groups(zoo, chains, mesh) for mesh in meshes if "dp" in mesh}
    out |= {mesh: pipeline(zoo, chains, mesh) for mesh in meshes if "pp" in mesh}
    for mesh in plain:
        if ADAPTER in chains:
            out[mesh]["swapped"] = swap(zoo, mesh)
        if "ep" in mesh:
            out[mesh]["experts_swapped"] = swap_experts(zoo, mesh)
    json.dump(out, sys.stdout)
