"""The heuristic: greedy, then local search (local_search.py, docs/placement.md)."""

import numpy as np

from jblock.scheduler.placement.local_search import TIGHT, greedy, improve, restore
from jblock.scheduler.placement.model import Model, Trip
from jblock.scheduler.placement.occupancy import Occupancy, Way
from jblock.scheduler.placement.records import Placement, PlacementError, Problem, Route
from jblock.scheduler.placement.routing import find_way

Stop = tuple[int, ...]

_FULL = 1e9
"""The same, where only bytes count."""
_MOST_EJECTED = 200
_BUSY = 0.33
"""Of an agent's time: as long as another row costs what the first did."""


def place(
    problem: Problem, previous: Placement | None = None, *, effort: int = 1200, seed: int = 0
) -> Placement:
    """Finds a place for all blocks, and routes for all chains.

    Greedy: chains by their rows a second, most first, each by the cheapest route that what lies there
    leaves. Then local search: some related chains are taken out and put in again, and what is cheaper
    stays. Both are deterministic.

    Args:
      problem: what is to be placed.
      previous: where chains lie. They stay as they are where their blocks and agents are still there; others
        are moved only if new ones find no room otherwise.
      effort: routes the local search may look at.
      seed: of its choices.

    Raises:
      PlacementError: what does not fit, and what there is room for.
    """
    model = Model(problem)
    _check_sizes(model)
    rng = np.random.default_rng(seed)
    state = Occupancy(model)
    kept = _take_over(state, previous) if previous is not None else set()
    _first(state, sorted(state.unplaced, key=lambda i: -model.trips[i].rate))
    if state.unplaced:
        _make_room(state, rng)
    movable = np.array([i for i in range(len(model.trips)) if i not in kept], np.int64)
    improve(state, movable, rng, effort)
    return _record(state)


def _check_sizes(model: Model) -> None:
    """Refuses what no search could place.

    Raises:
      PlacementError: what is too large.
    """
    problem, most = model.problem, float(model.memory.max())
    for trip in model.trips:
        for stop, nbytes in zip(trip.stops, trip.nbytes, strict=True):
            if nbytes > most:
                ids = " and ".join(model.block_ids[b] for b in stop)
                raise PlacementError(
                    f"chain {problem.chains[trip.chain].name!r}: block {ids} takes {nbytes:,.0f} bytes "
                    f"on one agent, the largest has {most:,.0f}: give an agent more memory, or shard "
                    "it over more devices"
                )
    placed = {b for trip in model.trips for stop in trip.stops for b in stop}
    total, room = model.nbytes[list(placed)].sum() if placed else 0, model.memory.sum()
    if total > room:
        raise PlacementError(
            f"{len(placed)} blocks of {len(problem.chains)} chains take {total:,.0f} bytes, the "
            f"{len(model.memory)} agents have {room:,.0f} together: add agents or memory, or serve fewer "
            "chains"
        )


def _take_over(state: Occupancy, previous: Placement) -> set[int]:
    """Routes of before that still work; returns their trips."""
    problem = state.model.problem
    at = {a.name: i for i, a in enumerate(problem.agents)}
    left: dict[str, list[Route]] = {}
    kept = set()
    for i, trip in enumerate(state.model.trips):
        chain = problem.chains[trip.chain]
        if chain.name not in left:  # as many of each route as its share is of this trip's
            before = previous.routes.get(chain.name, ())
            times = [max(round(route.share / trip.share), 1) for route in before]
            left[chain.name] = [r for r, n in zip(before, times, strict=True) for _ in range(n)]
        routes = left[chain.name]
        while routes:
            names = routes.pop(0).agents
            if len(names) != len(chain.blocks) or any(a not in at for a in names):
                continue
            way = np.array([at[a] for a in names])
            way = way[1:] if len(way) > 1 else way
            if state.fits(trip, way):
                state.add(i, way)
                kept.add(i)
                break
    return kept


def _first(state: Occupancy, order: list[int]) -> None:
    """The greedy placement. Memory grows dear as what is free comes near what still has no place, so that
    replicas for popular chains leave room for all."""
    model = state.model
    placed = np.asarray(state.users.any(1))
    waiting = np.zeros(len(placed), bool)
    for i in order:
        waiting[model.trips[i].blocks] = True
    to_come = float(model.nbytes[waiting & ~placed].sum())
    room = float(model.memory.sum())
    families = _Families(state)
    for i in families.founders_first(order):
        trip = model.trips[i]
        slack = (state.free.sum() - to_come) / room
        price = 1.0 if slack > 0.2 else TIGHT if slack > 0.1 else _FULL
        way = families.follow(trip)
        if way is None and (way := find_way(state, trip, price)) is not None:
            families.note(trip, way)
        if way is not None:
            state.add(i, way)
            new = trip.blocks[~placed[trip.blocks]]
            placed[new] = True
            to_come -= float(model.nbytes[new].sum())


class _Families:
    """The last way that was found for a chain of each family: those whose first shared stop is the same. Less
    popular chains of it go the same way, their own blocks beside it, while that fits and its agents are not
    busy: most of a large fleet needs no search."""

    def __init__(self, state: Occupancy):
        self._state = state
        trips = {t.chain: t for t in state.model.trips}.values()
        users = np.zeros(len(state.model.nbytes), np.int64)
        for trip in trips:
            users[trip.blocks] += 1
        self._shared: np.ndarray = users > 1
        self._last: dict[Stop, tuple[dict[Stop, int], int]] = {}

    def founders_first(self, order: list[int]) -> list[int]:
        """Trips that bring shared blocks before all others, those with the largest first: they would find no
        room between what is small."""
        trips, seen = self._state.model.trips, ~self._shared
        founders = []
        for i in order:
            if not seen[trips[i].blocks].all():
                seen[trips[i].blocks] = True
                founders.append(i)
        founders.sort(key=lambda i: -trips[i].nbytes.max())
        first = set(founders)
        return [*founders, *(i for i in order if i not in first)]

    def note(self, trip: Trip, way: Way) -> None:
        """Remembers a way that was found."""
        pairs = dict(zip(trip.stops, way.tolist(), strict=True))
        shared = {stop: agent for stop, agent in pairs.items() if self._is_shared(stop)}
        if shared:
            own = next((a for stop, a in pairs.items() if stop not in shared), int(way[-1]))
            self._last[next(iter(shared))] = (shared, own)

    def follow(self, trip: Trip) -> Way | None:
        """The way of its family for a trip; None where it has none, or should look for its own."""
        first = next((stop for stop in trip.stops if self._is_shared(stop)), None)
        if first not in self._last:
            return None
        shared, spill = self._last[first]
        if any(stop not in shared and self._is_shared(stop) for stop in trip.stops):
            return None
        beside, last = [], shared[first]
        for stop in trip.stops:
            last = shared.get(stop, last)
            beside.append(last)
        for way in (
            np.array(beside),
            np.array([shared.get(stop, spill) for stop in trip.stops]),
        ):
            busy = (self._state.load[way] + trip.total_work) / self._state.model.devices[way]
            if busy.max() <= _BUSY and self._state.fits(trip, way):
                return way
        return None

    def _is_shared(self, stop: Stop) -> bool:
        return all(self._shared[b] for b in stop)


def _make_room(state: Occupancy, rng: np.random.Generator) -> None:
    """Takes out more and more placed trips, and puts them in again, tighter, behind those without a place.

    Raises:
      PlacementError: no room was found.
    """
    model = state.model
    placed = [i for i, way in enumerate(state.ways) if way is not None]
    for turn in range(60):
        out = state.unplaced
        count = min(len(placed), 2 + int(len(placed) * ((turn + 1) / 60) ** 2), _MOST_EJECTED)
        victims = _neighbors(state, placed, count, rng) if placed else []
        before = {i: state.ways[i] for i in victims}
        for i in before:
            state.remove(i)
        size = {i: model.trips[i].nbytes.max() * (1 + 0.3 * rng.random()) for i in (*out, *before)}
        greedy(state, sorted(size, key=lambda i: -size[i]), _FULL)
        if len(state.unplaced) > len(out):
            restore(state, [*out, *before], before)
        if not state.unplaced:
            return
        placed = [i for i, way in enumerate(state.ways) if way is not None]
    trip = model.trips[state.unplaced[0]]
    name = model.problem.chains[trip.chain].name
    missing = [
        model.block_ids[b]
        for stop, row in zip(trip.stops, state.missing(trip), strict=True)
        for b in stop
        if (row > state.free).all()
    ] or [model.block_ids[b] for stop in trip.stops for b in stop]
    raise PlacementError(
        f"{len(state.unplaced)} of {len(model.trips)} routes found no room; chain {name!r} lacks it for "
        f"block {missing[0]} of {model.problem.blocks[missing[0]].nbytes:,} bytes: the agents have "
        f"{state.free.sum():,.0f} free together, the most on one is {state.free.max():,.0f}: add "
        "agents or memory, or serve fewer chains"
    )


def _neighbors(
    state: Occupancy, placed: list[int], count: int, rng: np.random.Generator
) -> list[int]:
    """Trips that pass one agent or a few, drawn at random."""
    agents = rng.permutation(len(state.free))
    near: list[int] = []
    for few in (1, 3, len(agents)):
        chosen = np.zeros(len(agents), bool)
        chosen[agents[:few]] = True
        near = [i for i in placed if (way := state.ways[i]) is not None and chosen[way].any()]
        if len(near) >= count:
            break
    return rng.permutation(near)[:count].tolist()


def _record(state: Occupancy) -> Placement:
    """The placement as plain records; equal routes of a chain are one."""
    model, problem = state.model, state.model.problem
    names = [a.name for a in problem.agents]
    shares: dict[str, dict[tuple[str, ...], float]] = {c.name: {} for c in problem.chains}
    for trip, way in zip(model.trips, state.ways, strict=True):
        chain = problem.chains[trip.chain]
        assert way is not None, f"trip of {chain.name} without a way"
        stops = tuple(names[a] for a in way)
        agents = stops if len(chain.blocks) == 1 else (stops[-1], *stops)
        found = shares[chain.name]
        found[agents] = found.get(agents, 0.0) + trip.share
    return Placement(
        routes={
            name: tuple(Route(share=min(s, 1.0), agents=agents) for agents, s in found.items())
            for name, found in shares.items()
        },
        blocks={
            name: tuple(model.block_ids[b] for b in np.flatnonzero(state.users[:, a]))
            for a, name in enumerate(names)
        },
    )
