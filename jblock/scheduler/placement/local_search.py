"""Local search: placed routes are changed a few at a time, and what is cheaper stays."""

import numpy as np

from jblock.scheduler.placement.occupancy import Occupancy, Way
from jblock.scheduler.placement.routing import find_way

TIGHT = 30.0
"""Times the price of memory: where it would soon be too little for what has no place yet."""
_PRICES = (1.0, 1.0, 0.0, TIGHT)
"""That rounds of the local search go by."""
_WORSE = 0.1
"""Of the least cost: how much dearer the local search may go on from, at first."""
_CYCLES = 3
"""How often it does so anew, from the best that was found."""
_SHARES = (0.15, 0.3, 0.5)
"""Of the trips, that a round of the local search takes out together, at most _MOST_OUT."""
_MOST_OUT = 6
_MOST_FOR_MOVES = 100
"""Trips: with more of them a block has too many users to be moved for all."""
_EXCHANGED = 0.5
"""Of the moves: those that are an exchange."""
_ONE_STOP = 0.5
"""Of the moves: those of one stop's blocks; the others move all that a trip has on an agent."""


def greedy(state: Occupancy, order: list[int], price: float) -> bool:
    """Routes trips one after the other; returns whether all found room."""
    all_ = True
    for i in order:
        way = find_way(state, state.model.trips[i], price)
        if way is None:
            all_ = False
        else:
            state.add(i, way)
    return all_


def improve(state: Occupancy, movable: np.ndarray, rng: np.random.Generator, effort: int) -> None:
    """Takes related trips out and puts them in again in another order, or moves blocks for all trips that
    have them there, as long as the effort lasts. What comes out a little dearer is gone on from as well,
    ever less so; the cheapest of all stays."""
    if not len(movable):
        return
    least = state.cost
    best, left, turn, cycle = list(state.ways), effort, 0, float(_CYCLES)
    moves = len(movable) <= _MOST_FOR_MOVES and len(state.free) > 1
    while left > 0:
        again, heat = divmod(left / effort * _CYCLES, 1.0)
        if again != cycle:
            cycle = again
            _return(state, best)
        most = least + _WORSE * heat * least
        changed = (_move if moves and turn % 2 else _reroute)(state, movable, rng, turn, most)
        if state.cost < least * (1 - 1e-12):
            least, best = state.cost, list(state.ways)
        left -= changed
        turn += 1
    _return(state, best)


def _reroute(
    state: Occupancy, movable: np.ndarray, rng: np.random.Generator, turn: int, most: float
) -> int:
    """Routes related trips anew, one after the other, if that costs no more than `most`; returns how many it
    looked at."""
    share = _SHARES[turn % len(_SHARES)]
    count = int(min(max(share * len(movable), 1), _MOST_OUT, len(movable)))
    chosen = _related(state, movable, count, rng)
    before = {i: state.ways[i] for i in chosen}
    for i in chosen:
        state.remove(i)
    order = [chosen[j] for j in rng.permutation(len(chosen))]
    price = _PRICES[int(rng.integers(len(_PRICES)))]
    if not (greedy(state, order, price) and state.cost <= most):
        restore(state, chosen, before)
    return len(chosen)


def _move(
    state: Occupancy, movable: np.ndarray, rng: np.random.Generator, turn: int, most: float
) -> int:
    """Moves some blocks from an agent to another, for all trips that have them there, or lets them change
    places with some of the other's, if that costs no more than `most`. Returns 1: no trip is routed anew.

    What many trips share leaves an agent only when all of them go, and where memory is tight only if
    something comes in its place: routing a few anew finds neither."""
    a, b = (int(x) for x in rng.permutation(len(state.free))[:2])
    ways = {i: way for i in movable.tolist() if (way := state.ways[i]) is not None}
    going = _some_blocks(state, ways, a, rng)
    coming = _some_blocks(state, ways, b, rng) if rng.random() < _EXCHANGED else set()
    before: dict[int, Way | None] = {}
    after: dict[int, Way] = {}
    for i, way in ways.items():
        new = way.copy()
        for s, stop in enumerate(state.model.trips[i].stops):
            if way[s] == a and not going.isdisjoint(stop):
                new[s] = b
            elif way[s] == b and not coming.isdisjoint(stop):
                new[s] = a
        if (new != way).any():
            before[i], after[i] = way, new
    for i in before:
        state.remove(i)
    for i, way in after.items():
        if not state.fits(state.model.trips[i], way):
            break
        state.add(i, way)
    else:
        if state.cost <= most:
            return 1
    restore(state, list(before), before)
    return 1


def _some_blocks(
    state: Occupancy, ways: dict[int, Way], agent: int, rng: np.random.Generator
) -> set[int]:
    """Of what a trip, drawn at random, has on an agent: one stop's blocks, or all."""
    for i in rng.permutation(list(ways)).tolist():
        way = ways[i]
        stops = [
            stop for stop, at in zip(state.model.trips[i].stops, way, strict=True) if at == agent
        ]
        if stops:
            one = rng.random() < _ONE_STOP
            return set(stops[rng.integers(len(stops))] if one else sum(stops, ()))
    return set()


def _related(
    state: Occupancy, movable: np.ndarray, count: int, rng: np.random.Generator
) -> list[int]:
    """A trip, and others that share agents with it, mostly."""
    first = int(movable[rng.integers(len(movable))])
    pool = movable if len(movable) <= 100 else rng.choice(movable, 100, replace=False)
    way = state.ways[first]
    own = set() if way is None else set(way.tolist())
    met = {
        int(i)
        for i in pool
        if i != first and (other := state.ways[i]) is not None and own & set(other.tolist())
    }
    score = {int(i): rng.random() - 0.5 * (int(i) in met) for i in pool if i != first}
    return [first, *sorted(score, key=score.__getitem__)[: count - 1]]


def _return(state: Occupancy, ways: list[Way | None]) -> None:
    """Goes back to the routes of before."""
    changed = [i for i, way in enumerate(ways) if way is not state.ways[i]]
    restore(state, changed, {i: ways[i] for i in changed})


def restore(state: Occupancy, chosen: list[int], before: dict[int, Way | None]) -> None:
    for i in chosen:
        state.remove(i)
    for i in chosen:
        way = before.get(i)
        if way is not None:
            state.add(i, way)
