"""What placement is given and what it gives: plain records, no arrays."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class PlacementError(ValueError):
    """A description that cannot be used, or blocks for which there is no room; the message names them."""


def _check(where: str, field: str, value: float, *, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlacementError(f"{where}: {field} is {value!r}: give a number")
    if value < least:
        raise PlacementError(f"{where}: {field} is {value}: give {least} or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agent:
    """Owner of a mesh.

    Attributes:
      name: unique.
      memory: bytes for blocks; what KV pages and programs take is taken off already.
      devices: that work beside each other.
      host: of its machine; "" is a machine of its own.
      zone: of hosts with a fast network between them.
    """

    name: str
    memory: int
    devices: int = 1
    host: str = ""
    zone: str = ""

    def __post_init__(self):
        where = f"agent {self.name!r}"
        if not self.name:
            raise PlacementError("agent: name is empty: give each agent a name of its own")
        _check(where, "memory", self.memory, least=0)
        _check(where, "devices", self.devices, least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """How rows go from one agent to another.

    Attributes:
      seconds: until the first byte is there.
      bytes_per_second: from then on.
    """

    seconds: float
    bytes_per_second: float

    def __post_init__(self):
        _check("link", "seconds", self.seconds, least=0)
        _check("link", "bytes_per_second", self.bytes_per_second, least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """Links by distance. The defaults were measured on one machine: shared memory, and gRPC.

    Attributes:
      host: between agents of one host.
      zone: between hosts of one zone.
      far: between zones.
    """

    host: Link = Link(seconds=45e-6, bytes_per_second=4e9)
    zone: Link = Link(seconds=0.3e-3, bytes_per_second=1e9)
    far: Link = Link(seconds=2e-3, bytes_per_second=1e8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A run of components that is placed as one.

    Attributes:
      id: unique.
      nbytes: of its parameters on an agent.
      seconds: of one step by rows in the batch, on one device.
    """

    id: str
    nbytes: int
    seconds: Mapping[int, float]

    def __post_init__(self):
        where = f"block {self.id!r}"
        _check(where, "nbytes", self.nbytes, least=0)
        if not self.seconds:
            raise PlacementError(f"{where}: seconds is empty: give the seconds of a batch of 1")
        for batch, seconds in self.seconds.items():
            _check(where, "batch", batch, least=1)
            _check(where, f"seconds of batch {batch}", seconds, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """A model as its blocks.

    Attributes:
      name: unique.
      blocks: ids in order, the embedding first and the head last. Both lie on the chain's home.
      popularity: rows (tokens) a second that are expected of it.
      row_bytes: of one hidden row between two blocks.
    """

    name: str
    blocks: tuple[str, ...]
    popularity: float = 0.0
    row_bytes: int = 8192

    def __post_init__(self):
        where = f"chain {self.name!r}"
        if not self.blocks:
            raise PlacementError(f"{where}: blocks is empty: a chain has at least one")
        _check(where, "popularity", self.popularity, least=0)
        _check(where, "row_bytes", self.row_bytes, least=0)

    @property
    def stops(self) -> tuple[tuple[str, ...], ...]:
        """What has to lie together, in the order a row visits it: each block by itself, then the home,
        where the head is and the embedding. From there the row goes round again."""
        if len(self.blocks) == 1:
            return (self.blocks,)
        return (*((b,) for b in self.blocks[1:-1]), (self.blocks[-1], self.blocks[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What counts how much in the cost, which is a number of rows (docs/placement.md).

    Attributes:
      hops: of a row on a link.
      load: of a row in a queue.
      memory: of an agent whose memory is full of blocks.
      least_popularity: rows a second that a chain is held to have at least, so that those nobody asks for
        yet lie well too.
    """

    hops: float = 1.0
    load: float = 1.0
    memory: float = 0.001
    least_popularity: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be placed, and where it may lie.

    Attributes:
      agents: that take blocks.
      blocks: by id.
      chains: that are served, each of them.
      links: between agents.
      weights: of the cost.
      step_seconds: of an engine's step: rows that come to a block meanwhile meet in one batch.
    """

    agents: tuple[Agent, ...]
    blocks: Mapping[str, Block]
    chains: tuple[Chain, ...]
    links: Links = Links()
    weights: Weights = Weights()
    step_seconds: float = 0.05

    def __post_init__(self):
        if not self.agents:
            raise PlacementError("agents is empty: name at least one")
        for what, names in (("agent", self.agents), ("chain", self.chains)):
            seen: set[str] = set()
            for one in names:
                if one.name in seen:
                    raise PlacementError(f"{what} {one.name!r} is given twice: names are unique")
                seen.add(one.name)
        for chain in self.chains:
            for id_ in chain.blocks:
                if id_ not in self.blocks:
                    raise PlacementError(f"chain {chain.name!r}: block {id_!r} is not described")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The longest run of a route's blocks on one agent.

    Attributes:
      agent: its name.
      blocks: ids, in order.
    """

    agent: str
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A way through a chain.

    Attributes:
      share: of the chain's rows that go by it.
      agents: the agent's name of each of the chain's blocks. The first is the last: the home.
    """

    share: float
    agents: tuple[str, ...]

    @property
    def home(self) -> str:
        """The agent of the head, and of a replica of the embedding."""
        return self.agents[-1]

    def spans(self, blocks: Iterable[str]) -> tuple[Span, ...]:
        """The runs of a chain's blocks on one agent each."""
        runs = itertools.groupby(zip(self.agents, blocks, strict=True), key=lambda at: at[0])
        return tuple(Span(agent=a, blocks=tuple(b for _, b in run)) for a, run in runs)

    @property
    def hops(self) -> Iterator[tuple[str, str]]:
        """From which agent to which a row goes, once round. The embedding is at the home."""
        return ((a, b) for a, b in itertools.pairwise(self.agents) if a != b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where all lies.

    Attributes:
      routes: of each chain, by name; more than one where its work is shared out.
      blocks: ids on each agent, by name.
    """

    routes: Mapping[str, tuple[Route, ...]]
    blocks: Mapping[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the placement."""
        return {
            "routes": {
                name: [{"share": r.share, "agents": list(r.agents)} for r in routes]
                for name, routes in self.routes.items()
            },
            "blocks": {agent: list(ids) for agent, ids in self.blocks.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Placement":
        """Inverse of `to_json`.

        Raises:
          PlacementError: fields missing or of a wrong type.
        """
        try:
            return cls(
                routes={
                    str(name): tuple(
                        Route(share=float(r["share"]), agents=tuple(map(str, r["agents"])))
                        for r in routes
                    )
                    for name, routes in data["routes"].items()
                },
                blocks={str(a): tuple(map(str, ids)) for a, ids in data["blocks"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise PlacementError(
                f"placement has missing or unknown fields ({e!r}): give what --json printed"
            ) from e
