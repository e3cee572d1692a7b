"""Agents that Ray starts, places and looks after, on whatever nodes its cluster has.

Ray knows where they are and starts them again elsewhere; whether one can be used, the server's connection to
it says, much sooner. Nothing of a request passes through Ray, nor does the secret: each node has it in a
file.
"""

import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jblock.engine.process.client import FACTORY
from jblock.hosts.agent import Agent
from jblock.hosts.credentials import from_files

# An actor that does not say where it is for so long is asked again.
_ANSWER_SECONDS = 5.0
_TRIES = 50


class RayAgents:
    """So many agents, each in a bundle of its own of a placement group. They end with this process.

    Attributes:
      places: of each agent, gives its address; see `RemoteChild`.
    """

    def __init__(
        self,
        address: str,
        agents: int,
        resources: Mapping[str, float],
        files: Mapping[str, str],
        factories: Collection[str] = (FACTORY,),
    ):
        """Asks Ray for them, and returns at once: they come as nodes have room.

        Args:
          address: of the cluster, as `ray.init` takes it.
          agents: how many.
          resources: of each, such as {"CPU": 4, "GPU": 1}.
          files: see `credentials.from_files`; paths that every node has.
          factories: see `Agent`.

        Raises:
          ValueError: Ray is not installed, or there is no such cluster.
        """
        from_files(files, "agents_")
        try:
            import ray
            from ray.util import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
        except ImportError as error:
            raise ValueError(
                f"ray: is not installed ({error}); pip install 'jblock[ray]'"
            ) from error
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"ray: no cluster at {address!r}: {error}") from error
        self._group = placement_group([dict(resources)] * agents, strategy="SPREAD")
        actor, options = ray.remote(RayAgent), _options(resources)
        self._actors = [
            actor.options(
                **options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=number
                ),
            ).remote(dict(files), tuple(factories))
            for number in range(agents)
        ]
        self.places: list[Callable[[], str]] = [
            functools.partial(self._where, number) for number in range(agents)
        ]

    def __enter__(self) -> "RayAgents":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the agents."""
        if self._ray.is_initialized():
            for actor in self._actors:
                self._ray.kill(actor)
            self._ray.util.remove_placement_group(self._group)
            self._ray.shutdown()

    def _where(self, number: int) -> str:
        """The address of an agent.

        Raises:
          ConnectionError: Ray has it nowhere just now.
        """
        try:
            return self._ray.get(self._actors[number].address.remote(), timeout=_ANSWER_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(
                f"Ray has no agent {number} now ({type(error).__name__})"
            ) from error


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """How an actor says that it takes all of its bundle, and that it is to be started again."""
    others = {name: count for name, count in resources.items() if name not in ("CPU", "GPU")}
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": others, "max_restarts": -1}


class RayAgent:
    """The actor: an agent in a process of Ray's."""

    def __init__(self, files: Mapping[str, str], factories: Collection[str]):
        """Listens on a free port of its node, and keeps the next one for rows."""
        import ray

        host = ray.util.get_node_ip_address()
        for _ in range(_TRIES):
            address = _free(host)
            with contextlib.suppress(ValueError):
                self._agent, self._address = Agent(address, files, factories=factories), address
                return
        raise RuntimeError(f"no two free ports on {host}")

    def address(self) -> str:
        """Where it listens."""
        return self._address


def _free(host: str) -> str:
    """An address whose port was free, and the next one too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(_TRIES):
        with socket.socket(family) as one, socket.socket(family) as other:
            one.bind((host, 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind((host, port + 1))
                return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    raise RuntimeError(f"no two free ports on {host}")
