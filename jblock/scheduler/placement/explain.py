"""Why a placement is as it is: rows for people and for --json."""

import collections
from typing import Any

from jblock.scheduler.placement.model import Costs, Model, costs
from jblock.scheduler.placement.records import Chain, Placement, Problem, Route


def explain(problem: Problem, placement: Placement) -> dict[str, Any]:
    """What lies where and why, as plain JSON.

    Returns:
      `cost` (its parts, in rows), `agents` (memory, the share of time they work, and their blocks with how
      many chains use each and why it lies there), `chains` (routes with spans, seconds on links, and why).
    """
    found: Costs = costs(problem, placement)
    return {
        "cost": {
            "total": found.total,
            "hops": found.hops,
            "load": found.load,
            "memory": found.memory,
        },
        "agents": _agents(problem, placement),
        "chains": [_chain(problem, placement, chain) for chain in problem.chains],
    }


def _agents(problem: Problem, placement: Placement) -> list[dict[str, Any]]:
    model = Model(problem)
    work = {t.chain: t.work / t.share for t in model.trips}
    users: dict[str, set[str]] = collections.defaultdict(set)
    homes: dict[str, set[str]] = collections.defaultdict(set)
    passing: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    load: dict[str, float] = collections.defaultdict(float)
    for i, chain in enumerate(problem.chains):
        for id_ in chain.blocks:
            users[id_].add(chain.name)
        for route in placement.routes[chain.name]:
            for id_, on in zip(chain.blocks, route.agents, strict=True):
                passing[on, id_].add(chain.name)
            homes[route.home].add(chain.name)
            stops = route.agents[1:] or route.agents
            for on, seconds in zip(stops, work[i], strict=True):
                load[on] += route.share * seconds
    copies = collections.Counter(id_ for ids in placement.blocks.values() for id_ in ids)
    rows = []
    for agent in problem.agents:
        ids = placement.blocks.get(agent.name, ())
        rows.append(
            {
                "agent": agent.name,
                "memory": agent.memory,
                "used": sum(problem.blocks[id_].nbytes for id_ in ids),
                "busy": float(load[agent.name] / agent.devices),
                "home_of": len(homes[agent.name]),
                "blocks": [
                    {
                        "block": id_,
                        "bytes": problem.blocks[id_].nbytes,
                        "chains": len(passing[agent.name, id_]),
                        "copies": copies[id_],
                        "why": _why_block(
                            len(users[id_]), len(passing[agent.name, id_]), copies[id_]
                        ),
                    }
                    for id_ in ids
                ],
            }
        )
    return rows


def _why_block(users: int, here: int, copies: int) -> str:
    chains = f"{here} of {users} chains pass it here" if users > 1 else "of one chain alone"
    if copies > 1:
        return f"{chains}; one of {copies} copies, which save hops or share out work"
    return f"{chains}; the only copy"


def _chain(problem: Problem, placement: Placement, chain: Chain) -> dict[str, Any]:
    routes = placement.routes[chain.name]
    return {
        "chain": chain.name,
        "popularity": chain.popularity,
        "bytes": sum(problem.blocks[id_].nbytes for id_ in set(chain.blocks)),
        "routes": [
            {
                "share": route.share,
                "home": route.home,
                "hop_seconds": hop_seconds(problem, chain, route),
                "spans": [
                    {"agent": s.agent, "blocks": list(s.blocks)} for s in route.spans(chain.blocks)
                ],
                "why": _why_route(problem, placement, chain, route),
            }
            for route in routes
        ],
    }


def hop_seconds(problem: Problem, chain: Chain, route: Route) -> float:
    """On links, of one row once round."""
    agents, total = {a.name: a for a in problem.agents}, 0.0
    for a, b in ((agents[x], agents[y]) for x, y in route.hops):
        links = problem.links
        if a.zone != b.zone:
            link = links.far
        elif a.host and a.host == b.host:
            link = links.host
        else:
            link = links.zone
        total += link.seconds + chain.row_bytes / link.bytes_per_second
    return total


def _why_route(problem: Problem, placement: Placement, chain: Chain, route: Route) -> str:
    shared = (
        "" if route.share == 1 else f"{route.share:.0%} of its rows, since they are much work; "
    )
    if len(set(route.agents)) == 1:
        return f"{shared}one span: a row makes no hop"
    size = sum(problem.blocks[id_].nbytes for id_ in set(chain.blocks))
    largest = max(a.memory for a in problem.agents)
    if size > largest:
        return f"{shared}the chain is larger than any agent's memory"
    room = {}
    for agent in problem.agents:
        there = set(placement.blocks.get(agent.name, ()))
        used = sum(problem.blocks[id_].nbytes for id_ in there)
        lacks = sum(problem.blocks[id_].nbytes for id_ in set(chain.blocks) - there)
        room[agent.name] = agent.memory - used - lacks
    if max(room.values()) < 0:
        return f"{shared}no agent has room for what it lacks of the chain"
    return f"{shared}hops cost less here than another copy or a longer queue"


def text(report: dict[str, Any], most: int = 20) -> str:
    """A report for people: agents, and the `most` popular chains."""
    cost = report["cost"]
    lines = [
        f"cost {cost['total']:.4g} rows: hops {cost['hops']:.4g}, load {cost['load']:.4g}, memory "
        f"{cost['memory']:.4g}",
        "",
    ]
    for row in report["agents"]:
        lines.append(
            f"{row['agent']}: {_size(row['used'])} of {_size(row['memory'])} in "
            f"{len(row['blocks'])} blocks, busy {row['busy']:.0%}, home of {row['home_of']} chains"
        )
        lines += [
            f"  {b['block'][:24]:<24} {_size(b['bytes']):>9}  {b['why']}"
            for b in row["blocks"][:most]
        ]
        if len(row["blocks"]) > most:
            lines.append(f"  and {len(row['blocks']) - most} more (--json has all)")
    lines.append("")
    by = sorted(report["chains"], key=lambda c: -c["popularity"])
    for chain in by[:most]:
        lines.append(f"{chain['chain']}: {chain['popularity']:g} rows a second")
        for route in chain["routes"]:
            spans = " -> ".join(f"{s['agent']} ({len(s['blocks'])} blocks)" for s in route["spans"])
            lines.append(
                f"  {spans}, home {route['home']}, {route['hop_seconds'] * 1e3:.3g} ms on links a row"
            )
            lines.append(f"    {route['why']}")
    if len(by) > most:
        lines.append(f"and {len(by) - most} more chains (--json has all)")
    return "\n".join(lines)


def _size(nbytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"
