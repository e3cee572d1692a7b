"""The cheapest way of one trip through what lies there already."""

import numpy as np

from jblock.scheduler.placement.model import Trip
from jblock.scheduler.placement.occupancy import Occupancy, Way

_BEAM = 12
_CANDIDATES = 16
_GOOD = 1.05
_FAR = 1e6


def find_way(state: Occupancy, trip: Trip, price: float = 1.0) -> Way | None:
    """The cheapest route found for a trip; None where there is no room for any.

    All agents are tried for the trip as one span. Where that is no dearer than it must be, it is taken.
    Otherwise a shortest path over (stop, agent) is looked for among the agents that have its blocks, or room
    for them; where there are few agents, or several stops do not fit together where each does alone, by a
    beam search that counts them together.

    Args:
      state: what lies where.
      trip: to be routed.
      price: what memory costs, of what it does: more of it packs tighter.
    """
    model, agents = state.model, len(state.free)
    missing = state.missing(trip)
    alone = missing.sum(0)
    grown = model.load_cost(state.load + trip.total_work) - state.load_costs
    cost = grown + price * alone * model.memory_price
    whole = np.where(alone <= state.free, cost, np.inf)
    best = int(whole.argmin())
    single = np.full(len(trip.stops), best) if np.isfinite(whole[best]) else None
    if single is not None:
        # Bytes that lie nowhere have to come, wherever the trip goes.
        absent = missing.min(1).sum()
        least = grown.min() + price * absent * model.memory_price.min()
        if cost[best] <= _GOOD * least and alone[best] <= absent:
            return single
    found = None
    chosen = np.arange(agents)
    if agents > _CANDIDATES:
        chosen = _candidates(state, cost, whole, missing)
        found = _shortest(state, trip, chosen, missing, price)
    if found is None or not state.fits(trip, found):
        found = _beam(state, trip, chosen, missing, price)
    if single is None or found is None:
        return single if found is None else found
    return found if state.growth(trip, found, price) < whole[best] else single


def _candidates(
    state: Occupancy, cost: np.ndarray, whole: np.ndarray, missing: np.ndarray
) -> np.ndarray:
    """Agents worth a look: those that could take the trip whole, those that would be good for it had they
    the room, for each stop one that has it, those with most room near the best, and those with most room."""
    each = _CANDIDATES // 4
    fit, good = (np.argpartition(values, each)[:each] for values in (whole, cost))
    first = fit if np.isfinite(whole[fit[0]]) else good
    crowded = state.load / state.model.devices - state.free / max(state.free.max(), 1)
    near = crowded + 2 * state.model.near(int(first[0]))
    roomy = (np.argpartition(values, each)[:each] for values in (near, crowded))
    have = (near + _FAR * (missing > 0)).argmin(1)
    return np.unique(np.concatenate([first, good, have, *roomy]))


def _shortest(
    state: Occupancy, trip: Trip, agents: np.ndarray, missing: np.ndarray, price: float
) -> Way | None:
    """The shortest path from home to home, for each home; stops do not see each other's bytes and work.
    Arrays are [homes, candidates]."""
    model = state.model
    missing, load, devices = missing[:, agents], state.load[agents], model.devices[agents]
    more = model.load_cost(load + trip.work[:, None], devices) - state.load_costs[agents]
    hop = model.hop_cost(trip, agents[:, None], agents[None, :])
    # Stops that are on the same agents, or nowhere, stay together.
    there = missing > 0
    runs = np.flatnonzero([True, *(there[1:] != there[:-1]).any(1)])
    lengths = np.diff([*runs, len(missing)])
    missing, more = np.add.reduceat(missing, runs), np.add.reduceat(more, runs)
    at = more + missing * (price * model.memory_price[agents])
    at[missing > state.free[agents]] = np.inf
    cost = hop + at[0]
    back = []
    for row in at[1:]:
        through = cost[:, :, None] + hop
        back.append(through.argmin(1))
        cost = through.min(1) + row
    if len(at) == 1:
        cost = cost - hop
    home = int(cost.diagonal().argmin())
    if not np.isfinite(cost[home, home]):
        return None
    way = [home]
    for pointers in reversed(back):
        way.append(int(pointers[home, way[-1]]))
    return np.repeat(agents[way[::-1]], lengths)


def _beam(
    state: Occupancy, trip: Trip, agents: np.ndarray, missing: np.ndarray, price: float
) -> Way | None:
    """The cheapest of the ways that a beam keeps: the best few, since ways that are equal up to an agent
    differ in the room they leave, and of every agent the best to it. Arrays are [kept ways, candidates]."""
    model, k = state.model, len(agents)
    missing, free = missing[:, agents], state.free[agents]
    load, devices = state.load[agents], model.devices[agents]
    bytes_price = price * model.memory_price[agents]
    hop = model.hop_cost(trip, agents[:, None], agents[None, :])
    cost, used, work = np.zeros(1), np.zeros((1, k)), np.zeros((1, k))
    ways = np.zeros((1, 0), np.int64)
    every = np.arange(k)
    for stop in range(len(trip.stops)):
        before = load + work
        more = model.load_cost(before + trip.work[stop], devices) - model.load_cost(before, devices)
        total = cost[:, None] + more + missing[stop] * bytes_price
        if stop:
            total = total + hop[ways[:, -1]]
        if stop == len(trip.stops) - 1 and stop:
            total = total + hop[:, ways[:, 0]].T
        total = np.where(used + missing[stop] <= free, total, np.inf)
        keep = np.argsort(total, axis=None, kind="stable")[:_BEAM]
        kept = np.zeros(total.size, bool)
        kept[keep] = kept[total.argmin(0) * k + every] = True
        keep = np.flatnonzero(kept & np.isfinite(total.ravel()))
        if not len(keep):
            return None
        row, column = np.divmod(keep, k)
        cost, ways = total.flat[keep], np.column_stack([ways[row], column])
        used, work = used[row], work[row]
        each = np.arange(len(keep))
        used[each, column] += missing[stop, column]
        work[each, column] += trip.work[stop]
    return agents[ways[cost.argmin()]]
