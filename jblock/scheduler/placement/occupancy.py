"""What lies where while routes are looked for: kept up to date route by route."""

import numpy as np

from jblock.scheduler.placement.model import Model, Trip

Way = np.ndarray
"""The agent's index at each stop of a trip, the home last."""


class Occupancy:
    """Routes of some of a model's trips, and what follows from them.

    Attributes:
      model: whose trips.
      ways: of each trip, by its index; None where it has none.
      users: how many visits of routes each block has on each agent [blocks, agents].
      free: bytes [agents].
      load: device seconds a second [agents].
      load_costs: what that costs [agents].
      hops: cost of all hops.
    """

    def __init__(self, model: Model):
        self.model = model
        self.ways: list[Way | None] = [None] * len(model.trips)
        self.users = np.zeros((len(model.nbytes), len(model.memory)), np.int32)
        self.free = model.memory.copy()
        self.load = np.zeros(len(model.memory))
        self.load_costs = np.zeros(len(model.memory))
        self.hops = 0.0

    @property
    def cost(self) -> float:
        """Of all routes there are (`model.py`)."""
        model = self.model
        used = model.memory - self.free
        return float(self.hops + self.load_costs.sum() + used @ model.memory_price)

    @property
    def unplaced(self) -> list[int]:
        """Trips without a route."""
        return [i for i, way in enumerate(self.ways) if way is None]

    def add(self, index: int, way: Way) -> None:
        """Gives a trip a route."""
        trip = self.model.trips[index]
        for stop, agent in zip(trip.stops, way, strict=True):
            for block in stop:
                if not self.users[block, agent]:
                    self.free[agent] -= self.model.nbytes[block]
                self.users[block, agent] += 1
        self._count(trip, way, 1)
        self.ways[index] = way

    def remove(self, index: int) -> Way | None:
        """Takes a trip's route away, with the blocks only it used, and returns it."""
        way, trip = self.ways[index], self.model.trips[index]
        if way is None:
            return None
        for stop, agent in zip(trip.stops, way, strict=True):
            for block in stop:
                self.users[block, agent] -= 1
                if not self.users[block, agent]:
                    self.free[agent] += self.model.nbytes[block]
        self._count(trip, way, -1)
        self.ways[index] = None
        return way

    def fits(self, trip: Trip, way: Way) -> bool:
        """Whether there is room for the blocks that a route misses."""
        return all(n <= self.free[agent] for agent, n in self._brought(trip, way).items())

    def growth(self, trip: Trip, way: Way, price: float = 1.0) -> float:
        """What a route would add to the cost, a byte of memory at `price` times what it costs."""
        model = self.model
        agents, at = np.unique(way, return_inverse=True)
        work = np.bincount(at, trip.work)
        load = model.load_cost(self.load[agents] + work, model.devices[agents])
        memory = sum(n * model.memory_price[a] for a, n in self._brought(trip, way).items())
        more = float((load - self.load_costs[agents]).sum())
        return model.route_cost(trip, way) + more + price * memory

    def _brought(self, trip: Trip, way: Way) -> dict[int, float]:
        """Bytes that a route would bring to agents."""
        new = {
            (block, agent)
            for stop, agent in zip(trip.stops, way.tolist(), strict=True)
            for block in stop
            if not self.users[block, agent]
        }
        out: dict[int, float] = {}
        for block, agent in new:
            out[agent] = out.get(agent, 0.0) + float(self.model.nbytes[block])
        return out

    def missing(self, trip: Trip, agents: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Bytes that each stop would bring to each agent [stops, agents]."""
        blocks = trip.blocks
        absent = (self.users[blocks][:, agents] == 0) * self.model.nbytes[blocks][:, None]
        if len(blocks) == len(trip.stops):
            return absent
        row = {int(b): i for i, b in enumerate(blocks)}
        out = np.zeros((len(trip.stops), absent.shape[1]))
        for s, stop in enumerate(trip.stops):
            for block in stop:
                if block in row:  # a block that comes back is there already
                    out[s] += absent[row.pop(block)]
        return out

    def _count(self, trip: Trip, way: Way, sign: int) -> None:
        np.add.at(self.load, way, sign * trip.work)
        touched = np.unique(way)
        self.load_costs[touched] = self.model.load_cost(
            self.load[touched], self.model.devices[touched]
        )
        self.hops += sign * self.model.route_cost(trip, way)
