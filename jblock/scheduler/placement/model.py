"""A problem as arrays, and what a placement costs.

The cost is a number of rows that wait: by Little's law rows a second times seconds. It is the sum of

- hops: rows on links; for every chain its rows a second times the seconds of its hops, once round;
- load: rows in queues; for every agent a bound from below, by its tangents, of u / (1 - u) a device, u being
  the share of its time that it works (the M/M/1 queue). Past nine tenths it grows linearly;
- memory: for every agent the share of its memory that blocks take, times a small weight.
"""

import dataclasses
import math

import numpy as np

from jblock.scheduler.placement.records import Agent, Placement, Problem

TANGENTS = tuple((1 / (1 - u) ** 2, u / (1 - u) - u / (1 - u) ** 2) for u in (0.0, 0.5, 0.75, 0.9))
"""Slope and intercept of each tangent of u / (1 - u)."""
_SHARE = 0.25
"""Of an agent's time: a chain with more work than that has several routes."""
_MOST_ROUTES = 64


def queued(load: np.ndarray, devices: np.ndarray) -> np.ndarray:
    """Rows in the queues of agents with some work (device seconds a second) for their devices."""
    use = load / devices
    slope, intercept = TANGENTS[0]
    most = slope * use + intercept
    for slope, intercept in TANGENTS[1:]:
        most = np.maximum(most, slope * use + intercept)
    return most * devices


@dataclasses.dataclass(frozen=True, eq=False)
class Trip:
    """A route to be found: a chain, or a share of one that has much work.

    Attributes:
      chain: index of its chain.
      share: of the chain's rows.
      rate: rows a second.
      row_bytes: of one row.
      stops: of each stop the blocks' indices.
      blocks: indices of all of them, each once.
      nbytes: of each stop; what an earlier stop has is not counted again.
      work: of each stop, device seconds a second.
      total_work: of all of them.
    """

    chain: int
    share: float
    rate: float
    row_bytes: int
    stops: tuple[tuple[int, ...], ...]
    blocks: np.ndarray
    nbytes: np.ndarray
    work: np.ndarray
    total_work: float


class Model:
    """A problem as arrays.

    Attributes:
      problem: it is of.
      memory: bytes [agents], float64.
      devices: [agents], float64.
      nbytes: of blocks [blocks], float64.
      block_ids: by index.
      trips: to be routed.
      memory_price: cost of a byte on each agent [agents].
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        agents, self.block_ids = problem.agents, tuple(problem.blocks)
        self.memory = np.array([a.memory for a in agents], np.float64)
        self.devices = np.array([a.devices for a in agents], np.float64)
        self.nbytes = np.array([b.nbytes for b in problem.blocks.values()], np.float64)
        self.memory_price = problem.weights.memory / np.maximum(self.memory, 1)
        hosts = {key: i for i, key in enumerate(dict.fromkeys(map(_host, agents)))}
        zones = {a.zone: i for i, a in enumerate(agents)}
        self._host = np.array([hosts[_host(a)] for a in agents])
        self._zone = np.array([zones[a.zone] for a in agents])
        links = (problem.links.host, problem.links.zone, problem.links.far)
        self._seconds = np.array([0.0, *(link.seconds for link in links)])
        self._per_byte = np.array([0.0, *(1 / link.bytes_per_second for link in links)])
        index = {id_: i for i, id_ in enumerate(self.block_ids)}
        work = self._seconds_per_row()
        self.trips = tuple(self._trips(index, work))

    def hop_cost(self, trip: Trip, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Rows on the way from agents `a` to agents `b` (broadcast together)."""
        tier = 3 - (self._zone[a] == self._zone[b]).astype(np.int8)
        tier -= self._host[a] == self._host[b]
        tier[a == b] = 0
        seconds = self._seconds + self._per_byte * trip.row_bytes
        return (self.problem.weights.hops * trip.rate * seconds)[tier]

    def load_cost(self, load: np.ndarray, devices: np.ndarray | None = None) -> np.ndarray:
        """Of agents with some work, weighted."""
        devices = self.devices if devices is None else devices
        return self.problem.weights.load * queued(load, devices)

    def route_cost(self, trip: Trip, agents: np.ndarray) -> float:
        """Of its hops, once round."""
        before = np.concatenate([agents[-1:], agents[:-1]])
        return float(self.hop_cost(trip, before, agents).sum())

    def near(self, agent: int) -> np.ndarray:
        """How far all agents are from one: 0 on its host, 1 in its zone, 2 elsewhere."""
        far = 2 - (self._zone == self._zone[agent]).astype(np.int8)
        far[self._host == self._host[agent]] = 0
        return far

    def _seconds_per_row(self) -> np.ndarray:
        """Of each block, in the batches that the rows of all its chains make."""
        rates: dict[str, float] = dict.fromkeys(self.block_ids, 0.0)
        for chain in self.problem.chains:
            for id_ in chain.blocks:
                rates[id_] += chain.popularity
        out = []
        for id_, block in self.problem.blocks.items():
            rows = max(rates[id_] * self.problem.step_seconds, 1)
            batch = max((b for b in block.seconds if b <= rows), default=min(block.seconds))
            out.append(block.seconds[batch] / batch)
        return np.array(out, np.float64)

    def _trips(self, index: dict[str, int], per_row: np.ndarray):
        devices = float(self.devices.mean())
        for i, chain in enumerate(self.problem.chains):
            rate = max(chain.popularity, self.problem.weights.least_popularity)
            stops = tuple(tuple(dict.fromkeys(index[b] for b in stop)) for stop in chain.stops)
            first = dict.fromkeys(b for stop in stops for b in stop)
            left = set(first)
            nbytes = []
            for stop in stops:
                nbytes.append(sum(self.nbytes[b] for b in stop if b in left))
                left -= set(stop)
            work = np.array([sum(per_row[index[b]] for b in stop) for stop in chain.stops])
            total = float(work.sum())
            routes = math.ceil(rate * total / (_SHARE * devices))
            routes = min(max(routes, 1), _MOST_ROUTES)
            trip = Trip(
                chain=i,
                share=1 / routes,
                rate=rate / routes,
                row_bytes=chain.row_bytes,
                stops=stops,
                blocks=np.array(list(first)),
                nbytes=np.array(nbytes, np.float64),
                work=work * rate / routes,
                total_work=total * rate / routes,
            )
            yield from [trip] * routes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What a placement costs, in rows, weighted."""

    hops: float
    load: float
    memory: float

    @property
    def total(self) -> float:
        """What is minimized."""
        return self.hops + self.load + self.memory


def costs(problem: Problem, placement: Placement) -> Costs:
    """What a placement costs, from its records alone.

    Raises:
      KeyError: a chain of the problem has no route in it.
    """
    model = Model(problem)
    at = {a.name: i for i, a in enumerate(problem.agents)}
    load = np.zeros(len(at))
    hops = 0.0
    for trip in {id(t): t for t in model.trips}.values():
        chain = problem.chains[trip.chain]
        for route in placement.routes[chain.name]:
            agents = np.array([at[a] for a in route.agents])
            stops = agents[1:] if len(agents) > 1 else agents
            part = route.share / trip.share
            hops += part * model.route_cost(trip, stops)
            np.add.at(load, stops, trip.work * part)
    used = np.zeros(len(at))
    for name, ids in placement.blocks.items():
        used[at[name]] = sum(problem.blocks[id_].nbytes for id_ in ids)
    return Costs(
        hops=hops,
        load=float(model.load_cost(load).sum()),
        memory=float((used * model.memory_price).sum()),
    )


def _host(agent: Agent) -> tuple[str, str]:
    return ("host", agent.host) if agent.host else ("agent", agent.name)
