"""Builds the engine of a zoo on disk: one agent, or a replica on every dp group of a mesh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jblock.engine.api import Engine
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache, default_folder
from jblock.engine.replicas import DataParallelEngine
from jblock.pallas_kernels import self_test
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.store import Zoo


def build_engine(
    *,
    zoo: str,
    models: Sequence[str] = (),
    profiler_port: int = 0,
    executable_cache: str = "",
    **settings: Any,
) -> Engine:
    """An engine over a zoo on disk.

    Args:
      zoo: folder of the zoo.
      models: chains to serve, "name" in its live version or "name@version"; when empty all of the zoo's
        that are exact.
      profiler_port: port an XLA profiler session may attach to; 0 opens none.
      executable_cache: folder of compiled programs; `executable_cache.default_folder()` when empty.
      **settings: fields of EngineConfig.

    Raises:
      ZooError: the zoo or a chain cannot be read.
      ValueError: a setting that cannot be used.
    """
    config = EngineConfig(**settings)
    store = Zoo.open(zoo)
    chains = served_chains(store, models, config)
    if profiler_port:
        jax.profiler.start_server(profiler_port)
    self_test.run(config.kv_dtype)
    cache = ExecutableCache(cache_folder(store, executable_cache))
    cache.prune()
    if config.sharding.mesh.dp > 1:
        return DataParallelEngine(store, chains, config, cache)
    return ThreadEngine(store, chains, config, cache)


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
    """These chains, "name" or "name@version", by name; of none, all that are exact.

    Raises:
      ZooError: there are none, or one cannot be read.
      ValueError: a pinned one is not among them.
    """
    # What is approximate is served only where it is named.
    names = list(models) or [n for n in store.chains() if store.chain(n).policy == "exact"]
    if not names:
        raise ZooError(
            f"zoo {str(store.path)!r} has no exact chains; convert a model first (jblock-convert hf "
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
    """The chain "name" in its live version, or "name@version".

    Raises:
      ZooError: there is none, or it cannot be read.
    """
    name, at, version = model.partition("@")
    if not at:
        return zoo.chain(name)
    if not version.isdecimal():
        raise ZooError(f"models: {model!r} has no number after its '@'; give name or name@version")
    return zoo.chain(name, int(version))
