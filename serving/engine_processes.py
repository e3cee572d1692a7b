"""The processes with engines that a server starts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jblock.engine.config import EngineConfig
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.parallel.rules import MeshShape
from jblock.scheduler.cluster import Cluster
from jblock.scheduler.pipeline import Pipeline

FACTORY = "jblock.engine.factory:build_engine"


def start_engine(
    kwargs: dict[str, Any], served: Sequence[str], heartbeat_seconds: float, **options: Any
) -> ProcessEngine:
    """An engine process that serves these ("name@version"), or of none what `kwargs` says.

    Args:
      kwargs: of `build_engine`.
      served: what an engine served that this one replaces.
      heartbeat_seconds: see `ProcessEngine`, and `options` too.
    """
    if served:
        names = {model.partition("@")[0] for model in served}
        pinned = [name for name in kwargs.get("pinned", ()) if name in names]
        kwargs = {**kwargs, "models": list(served), "pinned": pinned}
    return ProcessEngine(FACTORY, kwargs, heartbeat_seconds=heartbeat_seconds, **options)


def start_agents(
    kwargs: dict[str, Any], agents: int, folder: str, heartbeat_seconds: float
) -> Cluster | Pipeline:
    """So many agents on this machine; with `pp`, of one pipeline. Their sockets lie in the folder.

    Raises:
      ValueError: `pp` is another number.
    """
    mesh = MeshShape.parse(kwargs.get("mesh", ""))
    share = share_of_agent(kwargs, agents)
    if mesh.pp > 1:
        if mesh.pp != agents or mesh.dp > 1:
            raise ValueError(
                f"mesh {str(mesh)!r}: its pp agents are the processes of --agents={agents}; give pp={agents} "
                "and no dp"
            )
        mesh = dataclasses.replace(mesh, pp=1)
        share |= {"mesh": str(mesh), "span_agents": agents, "span_folder": folder}
    seats = share_out(agents, mesh.size)

    def start(agent: int, served: Sequence[str], notify: Callable[[], None]) -> ProcessEngine:
        own = dict(share)
        if "profiler_port" in own:
            own["profiler_port"] += agent
        if "span_folder" in own:
            own["span_agent"] = agent
        return start_engine(own, served, heartbeat_seconds, seat=seats[agent], notify=notify)

    if "span_folder" in share:
        return Pipeline(start, agents)
    return Cluster(start, agents, models=kwargs.get("models", ()))


def share_of_agent(arguments: dict[str, Any], agents: int) -> dict[str, Any]:
    """The arguments of each of several agents on one machine: memory that is stated is of all together, and
    so are the engine's own numbers for the host's."""
    config = EngineConfig()
    stated = {"host_kv_memory_mb": config.host_kv_memory_mb, "host_cache_mb": config.host_cache_mb}
    stated |= {
        n: arguments[n] for n in (*stated, "kv_memory_mb", "weights_memory_mb") if n in arguments
    }
    return {**arguments, **{name: -(-total // agents) for name, total in stated.items()}}
