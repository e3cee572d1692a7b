"""The processes with engines that a server starts."""

import dataclasses
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jblock.engine.api import ModelInfo
from jblock.engine.config import EngineConfig
from jblock.engine.process.client import FACTORY, ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.hosts.addresses import rows_address
from jblock.hosts.credentials import from_files
from jblock.hosts.remote_child import RemoteChild
from jblock.parallel.rules import MeshShape
from jblock.scheduler.cluster import Cluster, Start
from jblock.scheduler.pipeline import Pipeline
from jblock.zoo.store import Zoo


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
    own = _of_each(share_of_agent(kwargs, agents), agents)
    if "span_agents" in own:
        own["span_folder"] = folder
    seats = share_out(agents, MeshShape.parse(own.get("mesh", "")).size)

    def start(agent: int, served: Sequence[str], notify: Callable[[], None]) -> ProcessEngine:
        mine = _of_one(own, agent)
        if "profiler_port" in mine:
            mine["profiler_port"] += agent
        return start_engine(mine, served, heartbeat_seconds, seat=seats[agent], notify=notify)

    return _joined(start, own, agents)


def start_on_hosts(
    kwargs: dict[str, Any],
    places: Sequence[Callable[[], str]],
    files: Mapping[str, str],
    heartbeat_seconds: float,
) -> Cluster | Pipeline:
    """Engines beside agents on other hosts; with `pp`, of one pipeline. Memory that is stated is of each.

    Args:
      kwargs: of `build_engine`.
      places: of each agent, gives its address; see `RemoteChild`.
      files: see `jblock.hosts.credentials.from_files`.
      heartbeat_seconds: see `ProcessEngine`.

    Raises:
      ValueError: `pp` is another number, or the credentials cannot be used.
      OSError: a file cannot be read.
    """
    credentials = from_files(files, "agents_")
    own = _of_each(kwargs, len(places))
    if "span_agents" in own:
        home = rows_address(places[0]())
        own["span_network"] = {"session": secrets.token_hex(16), "home": home}
    localize = Tokenizers(kwargs["zoo"]).localized

    def start(agent: int, served: Sequence[str], notify: Callable[[], None]) -> ProcessEngine:
        return start_engine(
            _of_one(own, agent),
            served,
            heartbeat_seconds,
            notify=notify,
            begin=lambda: RemoteChild(places[agent], credentials),
            localize=localize,
        )

    return _joined(start, own, len(places))


def _of_each(kwargs: dict[str, Any], agents: int) -> dict[str, Any]:
    """The arguments of each of several agents.

    Raises:
      ValueError: `pp` is another number.
    """
    mesh = MeshShape.parse(kwargs.get("mesh", ""))
    if mesh.pp == 1:
        return dict(kwargs)
    if mesh.pp != agents or mesh.dp > 1:
        raise ValueError(
            f"mesh {str(mesh)!r}: its pp agents are the {agents} of --agents; give pp={agents} and no dp"
        )
    inner = dataclasses.replace(mesh, pp=1)
    return {**kwargs, "mesh": "" if inner.size == 1 else str(inner), "span_agents": agents}


def _of_one(own: dict[str, Any], agent: int) -> dict[str, Any]:
    return {**own, "span_agent": agent} if "span_agents" in own else dict(own)


def _joined(start: Start, own: dict[str, Any], agents: int) -> Cluster | Pipeline:
    if "span_agents" in own:
        return Pipeline(start, agents)
    return Cluster(start, agents, models=own.get("models", ()))


class Tokenizers:
    """The tokenizers of a zoo, for models that are served on other hosts."""

    def __init__(self, zoo: str):
        """Those of the zoo in this folder or at this URL."""
        self._location = zoo
        self._zoo: Zoo | None = None

    def localized(self, info: ModelInfo) -> ModelInfo:
        """A model with the folder that its tokenizer has here."""
        if not info.tokenizer_path or os.path.isdir(info.tokenizer_path):
            return info
        if self._zoo is None:
            self._zoo = Zoo.open(self._location)
        folder = self._zoo.tokenizer_path(os.path.basename(info.tokenizer_path))
        return dataclasses.replace(info, tokenizer_path=str(folder))


def share_of_agent(arguments: dict[str, Any], agents: int) -> dict[str, Any]:
    """The arguments of each of several agents on one machine: memory that is stated is of all together, and
    so are the engine's own numbers for the host's."""
    config = EngineConfig()
    stated = {"host_kv_memory_mb": config.host_kv_memory_mb, "host_cache_mb": config.host_cache_mb}
    stated |= {
        n: arguments[n] for n in (*stated, "kv_memory_mb", "weights_memory_mb") if n in arguments
    }
    return {**arguments, **{name: -(-total // agents) for name, total in stated.items()}}
