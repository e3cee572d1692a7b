"""The flags that say which agents compute for a server: here, on other hosts, or started by Ray."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from jblock.hosts.addresses import split
from jblock.hosts.ray_agents import RayAgents
from jblock.parallel.rules import MeshShape
from jblock.scheduler.cluster import Cluster
from jblock.scheduler.pipeline import Pipeline
from serving import engine_processes

AGENTS = flags.DEFINE_string(
    "agents",
    "1",
    "Engine processes on this machine, each with a share of the processors and with devices of its own; or "
    "where jblock-agent listens on each of several hosts: host:port,host:port.",
)
_AGENTS_CREDENTIALS = (
    flags.DEFINE_string(
        "agents_secret_file", None, "Secret that this server and agents on other hosts have."
    ),
    flags.DEFINE_string(
        "agents_tls_cert_file", None, "In place of a secret: this server's certificate, PEM."
    ),
    flags.DEFINE_string("agents_tls_key_file", None, "The private key of it, PEM."),
    flags.DEFINE_string("agents_tls_ca_file", None, "The authority of agents' certificates, PEM."),
)
_RAY = flags.DEFINE_string(
    "ray",
    None,
    "Address of a Ray cluster, such as auto or host:6379, that starts the --agents on its nodes.",
)
_RAY_RESOURCES = flags.DEFINE_list(
    "ray_resources", ["CPU=1"], "What of a node each of them has to have, such as CPU=4,GPU=1."
)


def are_wanted() -> bool:
    """Whether there are other agents than one engine here.

    Raises:
      ValueError: the flag says nothing of that kind.
    """
    return _agents() != 1 or bool(_RAY.value)


def start(
    kwargs: dict[str, Any], heartbeat_seconds: float, ends: contextlib.ExitStack
) -> Cluster | Pipeline:
    """Engines of the agents that the flags describe.

    Args:
      kwargs: of `build_engine`.
      heartbeat_seconds: see `ProcessEngine`.
      ends: gets what has to be ended after them.

    Raises:
      ValueError: they cannot be started so.
      OSError: a file cannot be read.
    """
    agents = _agents()
    files = {f.name.removeprefix("agents_"): f.value for f in _AGENTS_CREDENTIALS if f.value}
    places: Sequence[Callable[[], str]]
    if _RAY.value:
        mesh = kwargs.get("mesh", "")
        places = ends.enter_context(_ray_agents(_RAY.value, agents, files, mesh)).places
    elif isinstance(agents, int):
        folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="jblock-"))
        return engine_processes.start_agents(kwargs, agents, folder, heartbeat_seconds)
    else:
        places = [functools.partial(str, address) for address in agents]
    return engine_processes.start_on_hosts(kwargs, places, files, heartbeat_seconds)


def _ray_agents(ray: str, agents: int | list[str], files: dict[str, str], mesh: str) -> RayAgents:
    if not isinstance(agents, int):
        raise ValueError(
            f"agents: {AGENTS.value}: with --ray give how many; Ray says where they are"
        )
    if MeshShape.parse(mesh).pp > 1:
        raise ValueError(
            f"mesh: {mesh!r} with --ray: parts of a model need agents that stay where they are; name them by "
            "--agents=host:port,host:port"
        )
    resources = {}
    for word in _RAY_RESOURCES.value:
        name, _, count = word.partition("=")
        try:
            resources[name] = float(count)
        except ValueError as error:
            raise ValueError(
                f"ray_resources: {word!r} is none; give some like CPU=4,GPU=1"
            ) from error
    return RayAgents(ray, agents, resources, files)


def _agents() -> int | list[str]:
    """How many engine processes there are here, or the addresses of agents on other hosts."""
    if not AGENTS.value.isdecimal():
        hosts = AGENTS.value.split(",")
        for host in hosts:
            split(host)
        return hosts
    count = int(AGENTS.value)
    if not 0 < count < 1000:
        raise ValueError(f"agents: {count}; give a number from 1 on, or addresses of agents")
    return count
