"""Placement problems drawn at random, and an exact solver of small ones."""

import numpy as np
import scipy.optimize
import scipy.sparse

from jblock.scheduler.placement import Agent, Block, Chain, Link, Links, Problem
from jblock.scheduler.placement.model import TANGENTS, Model

GIB = 2**30


def random_problem(seed: int) -> Problem:
    """A small problem: 2 to 4 agents, trunks with private blocks, memory from tight to plenty."""
    rng = np.random.default_rng(seed)
    agents = int(rng.integers(2, 5))
    trunks = int(rng.integers(1, 3))
    blocks: dict[str, Block] = {}

    def block(id_: str, most: float) -> str:
        size = int(rng.uniform(0.2, most) * GIB)
        seconds = size / GIB * float(rng.uniform(5e-3, 2e-2))
        blocks[id_] = Block(
            id=id_, nbytes=size, seconds={1: seconds, 8: 2 * seconds, 32: 4 * seconds}
        )
        return id_

    chains = []
    for t in range(trunks):
        embedding, head = block(f"e{t}", 0.5), block(f"h{t}", 0.5)
        trunk = [block(f"t{t}.{i}", 2.0) for i in range(int(rng.integers(1, 4)))]
        for c in range(int(rng.integers(1, 4))):
            own = [block(f"p{t}.{c}.{i}", 1.0) for i in range(int(rng.integers(0, 2)))]
            at = int(rng.integers(1, len(trunk) + 1))
            middle = [*trunk[:at], *own, *(trunk[at:] if rng.random() < 0.7 else ())]
            chains.append(
                Chain(
                    name=f"c{t}.{c}",
                    blocks=(embedding, *middle, head),
                    popularity=float(rng.choice([0.0, 1.0, 5.0, 25.0])),
                    row_bytes=4096,
                )
            )
    total = sum(b.nbytes for b in blocks.values())
    largest = max(b.nbytes for b in blocks.values())
    memory = max(total * float(rng.uniform(1.05, 3.0)) / agents, largest * 1.2)
    return Problem(
        agents=tuple(
            Agent(
                name=f"a{i}",
                memory=int(memory * rng.uniform(0.9, 1.3)),
                devices=int(rng.integers(1, 3)),
                host=f"host{i // 2}",
                zone=f"zone{i // 3}",
            )
            for i in range(agents)
        ),
        blocks=blocks,
        chains=tuple(chains),
        links=Links(far=Link(seconds=3e-3, bytes_per_second=1e8)),
    )


def exact_cost(problem: Problem, seconds: float = 60.0) -> tuple[float, float] | None:
    """The least cost there is, by a mixed-integer program; None where there is no placement.

    Returns:
      The cost of the best placement found, and a lower bound of all.
    """
    model = Model(problem)
    agents, blocks = len(model.memory), len(model.nbytes)
    names: list[tuple] = [("on", b, a) for b in range(blocks) for a in range(agents)]
    names += [("queue", a) for a in range(agents)]
    for t, trip in enumerate(model.trips):
        n = len(trip.stops)
        names += [("at", t, s, a) for s in range(n) for a in range(agents)]
        if n > 1:
            pairs = [(a, b) for a in range(agents) for b in range(agents)]
            names += [("hop", t, s, a, b) for s in range(n) for a, b in pairs]
    index = {name: i for i, name in enumerate(names)}
    price = np.zeros(len(names))
    rows, low, high = [], [], []

    def constrain(terms: dict[tuple, float], least: float, most: float) -> None:
        rows.append({index[k]: v for k, v in terms.items()})
        low.append(least)
        high.append(most)

    for a in range(agents):
        price[index["queue", a]] = problem.weights.load * model.devices[a]
        constrain(
            {("on", b, a): model.nbytes[b] / GIB for b in range(blocks)}, 0, model.memory[a] / GIB
        )
        for b in range(blocks):
            price[index["on", b, a]] = model.nbytes[b] * model.memory_price[a]
        for slope, intercept in TANGENTS:
            work = {
                ("at", t, s, a): -slope * trip.work[s] / model.devices[a]
                for t, trip in enumerate(model.trips)
                for s in range(len(trip.stops))
            }
            constrain({("queue", a): 1.0, **work}, intercept, np.inf)
    grid = np.arange(agents)
    for t, trip in enumerate(model.trips):
        n = len(trip.stops)
        cost = model.hop_cost(trip, grid[:, None], grid[None, :])
        for s, stop in enumerate(trip.stops):
            constrain({("at", t, s, a): 1.0 for a in range(agents)}, 1, 1)
            for a in range(agents):
                for b in stop:
                    constrain({("on", b, a): 1.0, ("at", t, s, a): -1.0}, 0, np.inf)
                if n > 1:
                    for b in range(agents):
                        price[index["hop", t, s, a, b]] = cost[a, b]
                    out = {("hop", t, s, a, b): 1.0 for b in range(agents)}
                    constrain({**out, ("at", t, s, a): -1.0}, 0, 0)
                    into = {("hop", t, s, b, a): 1.0 for b in range(agents)}
                    constrain({**into, ("at", t, (s + 1) % n, a): -1.0}, 0, 0)
    at = [(r, c, v) for r, terms in enumerate(rows) for c, v in terms.items()]
    r, c, v = zip(*at, strict=True)
    matrix = scipy.sparse.csr_array((v, (r, c)), shape=(len(rows), len(names)))
    whole = np.array([name[0] in ("on", "at") for name in names])
    result = scipy.optimize.milp(
        price,
        constraints=scipy.optimize.LinearConstraint(matrix, low, high),
        integrality=whole,
        bounds=scipy.optimize.Bounds(0, np.where(whole, 1, np.inf)),
        options={"time_limit": seconds, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        return None
    return float(result.fun), float(result.mip_dual_bound)


def fleet(agents: int, chains: int, seed: int = 0) -> Problem:
    """A large problem: hosts of 8 agents, zones of 32; 40 bases of 8 blocks, and fine-tunes with none to
    three blocks of their own, few of which are popular. Blocks fill about half of the memory once."""
    rng = np.random.default_rng(seed)
    blocks: dict[str, Block] = {}

    def block(id_: str, size: float) -> str:
        blocks[id_] = Block(
            id=id_,
            nbytes=int(size * GIB),
            seconds={1: size * 1e-3, 8: size * 1.4e-3, 32: size * 2.4e-3},
        )
        return id_

    bases = []
    for base in range(40):
        size = float(rng.choice([0.25, 1.0, 4.0]))
        trunk = [block(f"b{base}.{i}", size) for i in range(8)]
        bases.append((block(f"b{base}.e", size / 2), trunk, block(f"b{base}.h", size / 2), size))
    found = []
    for c in range(chains):
        embedding, trunk, head, size = bases[int(40 * rng.random() ** 2)]
        middle = list(trunk)
        for i in range(int(rng.integers(0, 4))):
            middle[-1 - i] = block(f"c{c}.{i}", size / 4)
        found.append(
            Chain(
                name=f"c{c}",
                blocks=(embedding, *middle, head),
                popularity=float(min(agents / (c + 1) ** 0.9, 200)),
                row_bytes=8192,
            )
        )
    total = sum(b.nbytes for b in blocks.values())
    return Problem(
        agents=tuple(
            Agent(
                name=f"a{i}",
                memory=max(2 * total // agents, 6 * GIB),
                devices=1,
                host=f"h{i // 8}",
                zone=f"z{i // 32}",
            )
            for i in range(agents)
        ),
        blocks=blocks,
        chains=tuple(found),
    )
