"""Builds the engine of a zoo on disk: one agent, a replica on every dp group of a mesh, or a pipeline."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jblock.blocks.platform import here
from jblock.cpu_kernels.matmul import api as cpu_matmul
from jblock.engine.api import Engine
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.graph.span_placement import even_spans
from jblock.engine.groups.pipeline import PipelineEngine
from jblock.engine.groups.replicas import DataParallelEngine
from jblock.engine.platform_defaults import default_backend, engine_config
from jblock.engine.programs.executable_cache import (
    ExecutableCache,
    default_folder,
    environment,
)
from jblock.engine.spans.network import NetworkPort
from jblock.engine.spans.port import Port
from jblock.engine.spans.sockets import SocketPort
from jblock.pallas_kernels import backends, self_test
from jblock.parallel.placement import Placement
from jblock.zoo import assembled
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.store import Zoo


def build_engine(
    *,
    zoo: str,
    models: Sequence[str] = (),
    profiler_port: int = 0,
    executable_cache: str = "",
    verify: str = "once",
    backend: str = "",
    span_agent: int = 0,
    span_agents: int = 1,
    span_folder: str = "",
    span_network: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    """An engine over a zoo on disk.

    Args:
      zoo: folder or URL of the zoo.
      models: chains to serve, "name" in its active version, "name@version" or "name@alias"; when empty all
        of the zoo's that are exact.
      profiler_port: port an XLA profiler session may attach to; 0 opens none.
      executable_cache: folder of compiled programs; `executable_cache.default_folder()` when empty.
      verify: whether the hashes of components, deltas and tokenizers are checked when they are loaded:
        "always", "once" (until a file changes), "never".
      backend: whose kernels serve, one of `backends.BACKENDS`; the platform's own when empty.
      span_agent: which of `span_agents` processes with a span of every chain this one is; 0 is the home.
      span_agents: how many.
      span_folder: where their sockets lie, if they are on this machine.
      span_network: arguments of `NetworkPort`, if they are on several. With neither it is alone.
      **settings: fields of EngineConfig; those not given are the platform's own (platform_defaults.py).

    Raises:
      ZooError: the zoo or a chain cannot be read.
      ValueError: a setting that cannot be used.
    """
    platform = here()
    config = engine_config(settings, platform)
    by_default = "" if backend else default_backend(platform, config.kv_dtype)
    if backend := backend or by_default:
        backends.serve(platform.name, backend)
        if backend == "xla":
            cpu_matmul.disable()
        environment.cache_clear()
    store = Zoo.open(zoo, verify=verify)
    chains = served_chains(store, models, config)
    if profiler_port:
        jax.profiler.start_server(profiler_port)
    untrusted = platform.name if by_default else ""
    cache = _tested(cache_folder(store, executable_cache), config.kv_dtype, untrusted)
    cache.prune()
    if span_folder or span_network:
        placement = Placement.on(config.sharding)
        port: Port
        if span_network:
            port = NetworkPort(span_agent, placement, **span_network)
        else:
            port = SocketPort(span_agent, Path(span_folder), placement)
        place = even_spans(span_agents)
        # A sequence that gives way is computed anew: its KV lies on several agents.
        config = dataclasses.replace(config, host_kv_memory_mb=0)
        return ThreadEngine(store, chains, config, cache, placement, place=place, port=port)
    if config.sharding.mesh.pp > 1:
        return PipelineEngine(store, chains, config, cache)
    if config.sharding.mesh.dp > 1:
        return DataParallelEngine(store, chains, config, cache)
    return ThreadEngine(store, chains, config, cache)


def _tested(folder: Path, kv_dtype: str, untrusted: str) -> ExecutableCache:
    """The cache of programs, once the device's kernels have passed their self-test. It is run where no
    earlier start passed it with the same code, versions and kind of device.

    `untrusted` is the platform where nobody named its kernels and they may hang; "" elsewhere. Where the test
    did not end at an earlier start, XLA serves."""
    cache = ExecutableCache(folder)
    key = f"kernels passed their self-test over {kv_dtype} pages"
    if cache.is_noted(key):
        return cache
    begun, ended = f"{key}: begun", f"{key}: ended"
    if untrusted and cache.is_noted(begun) and not cache.is_noted(ended):
        logging.error(
            "the self-test of this device's kernels did not end at an earlier start: XLA's forms serve; "
            "name the kernels with --backend to try them again"
        )
        backends.serve(untrusted, "xla")
        environment.cache_clear()
        return ExecutableCache(folder)
    if untrusted:
        cache.note(begun)
    failed = self_test.run(kv_dtype)
    if untrusted:
        cache.note(ended)
    if not failed:
        cache.note(key)
        return cache
    # What was replaced belongs to what decides a program.
    environment.cache_clear()
    return ExecutableCache(folder)


def cache_folder(zoo: Zoo, named: str) -> Path:
    """The folder of compiled programs: the one named, or the user's own.

    Raises:
      ValueError: it lies in the zoo, whose files others may have made.
    """
    folder = Path(named) if named else default_folder()
    if folder.resolve().is_relative_to(zoo.path.resolve()):
        raise ValueError(
            f"executable_cache {str(folder)!r} lies in the zoo: what is in it is run, and zoos are copied "
            "around; name a folder outside"
        )
    return folder


def served_chains(store: Zoo, models: Sequence[str], config: EngineConfig) -> dict[str, Chain]:
    """These chains, "name", "name@version" or "name@alias", by name; of none, all that are exact. What they
    name stays in the zoo while `store` is in use.

    Raises:
      ZooError: there are none, or one cannot be read.
      ValueError: a pinned one is not among them.
    """
    # What is approximate is served only where it is named.
    names = list(models) or [n for n in store.chains() if _is_exact(store, n)]
    if not names:
        raise ZooError(
            f"zoo {store.storage.location!r} has no exact chains; convert a model first (jblock convert hf "
            "--help), or name the models to serve"
        )
    chains = [find_chain(store, name) for name in names]
    served = {chain.name: chain for chain in chains}
    unknown = sorted(set(config.pinned) - served.keys())
    if unknown:
        raise ValueError(
            f"pinned names {', '.join(unknown)}, which are not among the models served"
        )
    return served


def find_chain(zoo: Zoo, model: str) -> Chain:
    """The chain "name" in its active version, "name@version", or one that is assembled (`zoo/assembled.py`),
    checked and kept from being removed.

    Raises:
      ZooError: there is none, it cannot be read, or it is not what it says.
    """
    return assembled.serve(zoo, model)


def _is_exact(store: Zoo, name: str) -> bool:
    try:
        chain = store.chain(name)
        store.check_chain(chain)
    except ZooError as e:
        logging.warning("%s is not served: %s", name, e)
        return False
    return chain.policy == "exact"
