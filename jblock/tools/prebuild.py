"""Builds every program that some chains need before they are served, for devices that need not be here.

What a server would compile in the background is compiled now and kept in an executable
cache. A server with the same settings on the devices it was built for finds all of it there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import ServingGraph
from jblock.engine.groups.replicas import group_config, group_placements
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.runner.runner import Runner
from jblock.parallel.placement import Placement
from jblock.parallel.targets import CHIPS, Target
from jblock.tools import roofline
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

# Of a chip's memory: the rest is the runtime's, and room for what the allocator cannot pack.
USABLE = 0.92
# Of what weights leave of that: the rest is for what programs need beside their arguments.
KV_SHARE = 0.8
# Fields of a report that are added up over data parallel groups.
_ALL_CHIPS = ("code_bytes", "weight_bytes", "table_bytes", "kv_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was built.

    Attributes:
      target: what for.
      config: the settings a server must have for these programs to be its own.
      programs: how many it needs.
      compiled: those of them that were not in the cache yet.
      code_bytes: of their machine code, as far as the compiler says.
      weight_bytes: of all weights, on all chips together.
      table_bytes: of the adapters' tables, likewise.
      kv_bytes: of the KV pools, likewise.
      workspace_bytes: what the largest program needs beside its arguments, on each chip.
      chip_bytes: memory of a chip.
      fits: whether a chip's share of all that is in its memory.
      estimates: of the chain of most weights, by batch.
    """

    target: str
    config: EngineConfig
    programs: int
    compiled: int
    code_bytes: int
    weight_bytes: int
    table_bytes: int
    kv_bytes: int
    workspace_bytes: int
    chip_bytes: int
    fits: bool
    estimates: tuple[roofline.Estimate, ...]


def prebuild(
    zoo: Zoo,
    chains: Mapping[str, Chain],
    config: EngineConfig,
    target: Target,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compiles what is missing in the cache.

    For devices that are not here the memory of the KV pools cannot be what is free, so where the settings
    leave it open they take KV_SHARE of what the weights leave of a chip's, and the report's settings
    name it.

    Args:
      zoo: where the chains are.
      chains: by name.
      config: of the server.
      target: what for.
      folder: of the executable cache.
      progress: called with (done, total) after each program.

    Raises:
      ValueError: settings that do not fit the target, or a target that has no compiler here.
      OSError: the cache did not take the programs.
    """
    if config.sharding.mesh.pp > 1:
        raise ValueError(
            f"mesh {config.mesh!r}: programs of agents with spans are not built ahead; leave pp out or "
            "start the server once"
        )
    every = target.devices()
    if config.sharding.mesh.dp > 1:
        groups = group_placements(config, every, abstract=True)
        inner = group_config(config)
        reports = [
            _prebuild(zoo, chains, inner, target, folder, every, group, progress)
            for group in groups
        ]
        stated = dataclasses.replace(
            config, kv_memory_mb=reports[0].config.kv_memory_mb * len(groups)
        )
        return dataclasses.replace(
            reports[0],
            config=stated,
            **{
                n: sum(getattr(r, n) for r in reports)
                for n in ("programs", "compiled", *_ALL_CHIPS)
            },
        )
    placement = Placement.on(config.sharding, every, abstract=True)
    return _prebuild(zoo, chains, config, target, folder, every, placement, progress)


def _prebuild(
    zoo: Zoo,
    chains: Mapping[str, Chain],
    config: EngineConfig,
    target: Target,
    folder: Path,
    every: Sequence[jax.Device],
    placement: Placement,
    progress: Callable[[int, int], None] | None,
) -> Report:
    """The same for one group of devices."""
    graph = assemble(zoo, chains, config, placement=placement)
    weights = sum(
        {id(w): w.size for r in graph.routes.values() for w in r.weights.members}.values()
    )
    chip = CHIPS[target.chip]
    if not config.kv_memory_mb and target.platform != "cpu":
        config = dataclasses.replace(
            config,
            kv_memory_mb=_kv_memory_mb(config, placement, int(chip.memory * USABLE), weights),
        )
    cache = ExecutableCache(folder, every)
    device = Runner(graph, config, cache, placement)
    config = device.config
    executables = device.executables
    keys = list(dict.fromkeys(_keys(device, graph)))
    executables.warm(keys, config.compile_workers, progress)
    compiled = executables.compiles_in_background
    if cache.stored != compiled:
        raise OSError(
            f"{compiled - cache.stored} of {compiled} programs could not be kept in {folder}: see the "
            "log; free space there, or name another --executable_cache"
        )
    tables = sum(_nbytes(unit.tables) for i in graph.instances for unit in i.layers)
    pools = sum(s.page_bytes * s.num_pages for s in device.pool_shapes.values())
    workspace = executables.workspace(keys)
    chips = config.sharding.mesh.size
    needed = (weights + tables + pools) // chips + workspace
    return Report(
        target=str(target),
        config=config,
        programs=len(keys),
        compiled=compiled,
        code_bytes=executables.code_bytes(keys),
        weight_bytes=weights,
        table_bytes=tables,
        kv_bytes=pools,
        workspace_bytes=workspace,
        chip_bytes=chip.memory,
        fits=needed <= chip.memory * USABLE,
        estimates=_estimates(graph, config, placement, target),
    )


def _keys(device: Runner, graph: ServingGraph) -> list[ProgramKey]:
    return [*device.program_keys(graph, device.buckets), *device.segment_keys(graph)]


def _kv_memory_mb(config: EngineConfig, placement: Placement, usable: int, weights: int) -> int:
    left = usable * placement.rules.mesh.size - weights
    if left <= 0:
        raise ValueError(
            f"{weights} bytes of weights leave nothing of {placement.rules.mesh.size} x {usable} usable "
            "bytes for the KV cache: serve fewer models, bfloat16, or a larger mesh"
        )
    return max(int(left * KV_SHARE) // 10**6, 1)


def _nbytes(tables: Any) -> int:
    return sum(a.size * a.dtype.itemsize for part in tables for a in part.values())


def _estimates(
    graph: ServingGraph, config: EngineConfig, placement: Placement, target: Target
) -> tuple[roofline.Estimate, ...]:
    """Of the chain of most weights, at half the longest context."""

    def size(name: str) -> int:
        return sum(w.size for w in graph.routes[name].weights.members)

    route = graph.routes[max(graph.routes, key=size)]
    signatures = [u.signature for i in route.instances for u in i.layers]
    head_dims = [a.head_dim for s in signatures for a in s.attentions]
    # 8 bits carry a float32 scale a token and head.
    eight = 1 + 4 / max(head_dims, default=1)
    kv_item = {"float32": 4.0, "bfloat16": 2.0, "int8": eight}[config.kv_dtype]
    return tuple(
        roofline.decode_step(
            signatures,
            placement,
            CHIPS[target.chip],
            batch=bucket.num_seqs,
            context=min(config.max_model_len, route.chain.max_position) // 2,
            kv_item=kv_item,
        )
        for bucket in config.decode_buckets
    )
