"""Placement: its promises on problems drawn at random, its cost beside an exact solver's, its refusals."""

import dataclasses
import multiprocessing
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import GIB, exact_cost, fleet, random_problem

from jblock.scheduler.placement import (
    Agent,
    Block,
    Chain,
    Link,
    Links,
    Placement,
    PlacementError,
    Problem,
    place,
)
from jblock.scheduler.placement.explain import explain, hop_seconds, text
from jblock.scheduler.placement.model import costs

EFFORT = 60
QUICK = (0, 3, 5, 7, 8)  # those that the exact solver is done with soon


def block(id_: str, gib: float = 1.0, seconds: float = 1e-3) -> Block:
    return Block(id=id_, nbytes=int(gib * GIB), seconds={1: seconds})


def problem(memory, chains, blocks, **fields) -> Problem:
    """Agents a0, a1, ... of some GiB, two a host."""
    return Problem(
        agents=tuple(
            Agent(name=f"a{i}", memory=int(gib * GIB), host=f"h{i // 2}")
            for i, gib in enumerate(memory)
        ),
        blocks={b.id: b for b in blocks},
        chains=tuple(chains),
        **fields,
    )


def check(problem: Problem, found: Placement) -> None:
    """What every placement promises."""
    for agent in problem.agents:
        assert sum(problem.blocks[b].nbytes for b in found.blocks[agent.name]) <= agent.memory
    passed = {agent.name: set() for agent in problem.agents}
    for chain in problem.chains:
        routes = found.routes[chain.name]
        assert sum(r.share for r in routes) == pytest.approx(1)
        for route in routes:
            assert route.agents[0] == route.home  # the embedding has a replica beside the head
            for id_, agent in zip(chain.blocks, route.agents, strict=True):
                assert id_ in found.blocks[agent]
                passed[agent].add(id_)
    for agent, ids in found.blocks.items():
        assert passed[agent] == set(ids)  # nothing lies where nobody passes


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_memory_holds_and_every_chain_is_served(seed):
    drawn = random_problem(seed)
    try:
        found = place(drawn, effort=EFFORT)
    except PlacementError:
        return  # whether there is a placement at all is for the exact solver to say
    check(drawn, found)
    assert Placement.from_json(found.to_json()) == found
    assert place(drawn, effort=EFFORT) == found  # the same each time
    assert text(explain(drawn, found))


@pytest.mark.parametrize("seed", QUICK)
def test_cost_is_close_to_the_exact_solvers(seed):
    close_to_exact(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", sorted({*range(200)} - {*QUICK}))
def test_cost_is_close_to_the_exact_solvers_on_all_cases(seed):
    close_to_exact(seed)


def close_to_exact(seed: int) -> None:
    drawn = random_problem(seed)
    exact = exact_cost(drawn)
    if exact is None:
        with pytest.raises(PlacementError):
            place(drawn)
        return
    found = place(drawn)
    check(drawn, found)
    assert exact[1] * 0.999 <= costs(drawn, found).total <= 1.15 * exact[0]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.data())
def test_a_new_chain_moves_no_other_while_there_is_room(seed, data):
    drawn = random_problem(seed)
    roomy = dataclasses.replace(
        drawn, agents=tuple(dataclasses.replace(a, memory=3 * a.memory) for a in drawn.agents)
    )
    new = data.draw(st.sampled_from(roomy.chains))
    rest = tuple(c for c in roomy.chains if c is not new)
    if not rest:
        return
    before = place(dataclasses.replace(roomy, chains=rest), effort=EFFORT)
    after = place(roomy, before, effort=EFFORT)
    check(roomy, after)
    for chain in rest:
        routes = ({r.agents for r in p.routes[chain.name]} for p in (after, before))
        assert next(routes) <= next(routes)
    brought = {a: set(after.blocks[a]) - set(before.blocks[a]) for a in after.blocks}
    assert set().union(*brought.values()) <= set(new.blocks)


def test_a_lost_agent_moves_only_what_it_had():
    many = fleet(12, 60)
    before = place(many, effort=EFFORT)
    lost = many.agents[3].name
    fewer = dataclasses.replace(many, agents=tuple(a for a in many.agents if a.name != lost))
    after = place(fewer, before, effort=EFFORT)
    check(fewer, after)
    for name, routes in before.routes.items():
        kept = {r.agents for r in routes if lost not in r.agents}
        assert not kept or kept & {r.agents for r in after.routes[name]}


@pytest.mark.long
def test_a_thousand_agents_and_ten_thousand_chains():
    """Seconds of a process that does nothing else: whatever the machine does, and what tests before left."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply_async(place_a_thousand_agents).get(300)
    assert seconds < 10


def place_a_thousand_agents() -> float:
    """Places them, looks at what came out, and returns what placing took."""
    many = fleet(1000, 10_000)
    began = time.process_time()
    found = place(many)
    seconds = time.process_time() - began
    check_fleet(many, found)
    return seconds


def test_many_agents_and_chains():
    many = fleet(60, 600)
    check_fleet(many, place(many, effort=EFFORT))


def check_fleet(many: Problem, found: Placement) -> None:
    """Its chains are served, the popular by fewer spans."""
    check(many, found)
    spans = [len(found.routes[c.name][0].spans(c.blocks)) for c in many.chains]
    tenth = len(spans) // 10
    assert sum(spans[:tenth]) / tenth < sum(spans) / len(spans) < 4


TRUNK = [block("e", 0.1), block("t0"), block("t1"), block("h", 0.1)]


def test_a_private_block_lies_beside_its_trunk():
    chains = [
        Chain(name="base", blocks=("e", "t0", "t1", "h"), popularity=5),
        Chain(name="tuned", blocks=("e", "t0", "p", "h"), popularity=1),
    ]
    found = place(problem([3.5, 3.5, 3.5], chains, [*TRUNK, block("p")]), effort=EFFORT)
    ((route,), (tuned,)) = found.routes["base"], found.routes["tuned"]
    assert set(route.agents) == set(tuned.agents) and len(set(route.agents)) == 1


def test_the_popular_chain_has_one_span_where_memory_is_short():
    """Only one of two chains of three blocks finds them together."""
    names = {"a": ("e", "a0", "t", "a1", "h"), "b": ("e", "b0", "t", "b1", "h")}
    blocks = [block(b) for b in ("t", "a0", "a1", "b0", "b1")]
    blocks += [block("e", 0.1), block("h", 0.1)]
    for popular in names:
        chains = [
            Chain(name=n, blocks=b, popularity=50 if n == popular else 1) for n, b in names.items()
        ]
        found = place(problem([3.3, 2.3], chains, blocks), effort=EFFORT)
        assert len(set(found.routes[popular][0].agents)) == 1
        (other,) = set(names) - {popular}
        assert len(set(found.routes[other][0].agents)) == 2


def test_hops_use_the_fastest_links():
    """What does not fit on one agent goes to the neighbor on its host."""
    chain = Chain(name="c", blocks=("e", "t0", "t1", "h"), popularity=10)
    found = place(problem([1.3, 1.3, 1.3, 1.3], [chain], TRUNK), effort=EFFORT)
    (route,) = found.routes["c"]
    hosts = {int(a[1:]) // 2 for a in route.agents}
    assert len(set(route.agents)) == 2 and len(hosts) == 1


def test_work_is_shared_out_over_replicas():
    chain = Chain(name="c", blocks=("e", "t0", "t1", "h"), popularity=500)
    few = problem([9, 9, 9], [chain], TRUNK)
    found = place(few, effort=EFFORT)
    check(few, found)
    assert len({r.home for r in found.routes["c"]}) == 3
    busy = [row["busy"] for row in explain(few, found)["agents"]]
    assert max(busy) < 0.9  # of two agents' work
    why = explain(few, found)["chains"][0]["routes"][0]["why"]
    assert "of its rows" in why


def test_a_chain_may_pass_a_block_twice():
    chain = Chain(name="c", blocks=("e", "t0", "t1", "t0", "h"), popularity=1)
    twice = problem([2.3], [chain], TRUNK)
    check(twice, place(twice, effort=EFFORT))


def test_a_report_says_where_and_why():
    chain = Chain(name="c", blocks=("e", "t0", "t1", "h"), popularity=10)
    given_ = problem([1.3, 1.3], [chain], TRUNK)
    found = place(given_, effort=EFFORT)
    report = explain(given_, found)
    (row,) = report["chains"]
    (route,) = row["routes"]
    assert [b for s in route["spans"] for b in s["blocks"]] == list(chain.blocks)
    assert "larger than any agent's memory" in route["why"]
    assert route["hop_seconds"] == hop_seconds(given_, chain, found.routes["c"][0]) > 0
    assert report["cost"]["hops"] == pytest.approx(10 * route["hop_seconds"])
    shown = text(report)
    assert "the only copy" in shown and "c: 10 rows a second" in shown


CHAIN = Chain(name="c", blocks=("e", "t0", "t1", "h"))
REFUSED = {
    "a block too large": (
        lambda: place(problem([0.9, 0.9], [CHAIN], TRUNK), effort=EFFORT),
        ["chain 'c'", "block t0", "1,073,741,824 bytes", "more memory"],
    ),
    "all together": (
        lambda: place(problem([1.1, 1.05], [CHAIN], [*TRUNK, block("x")]), effort=EFFORT),
        ["4 blocks of 1 chains", "add agents or memory"],
    ),
    "no room that is in one piece": (
        lambda: place(
            problem([1.5, 1.5, 1.5], [Chain(name="c", blocks=tuple("uvwx"))], map(block, "uvwx"))
        ),
        ["chain 'c'", "takes"],
    ),
    "unknown block": (lambda: problem([1], [CHAIN], TRUNK[:2]), ["'c'", "'t1'", "not described"]),
    "twice": (lambda: problem([1], [CHAIN, CHAIN], TRUNK), ["'c'", "twice"]),
    "no agent": (lambda: problem([], [CHAIN], TRUNK), ["agents is empty"]),
    "devices": (lambda: Agent(name="a", memory=1, devices=0), ["'a'", "devices", "1 or more"]),
    "popularity": (
        lambda: Chain(name="c", blocks=("e",), popularity=float("nan")),
        ["'c'", "popularity", "number"],
    ),
    "link": (lambda: Link(seconds=-1, bytes_per_second=1), ["seconds", "-1"]),
    "previous": (lambda: Placement.from_json({"routes": 3}), ["--json"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name):
    call, words = REFUSED[name]
    with pytest.raises(PlacementError) as refused:
        call()
    assert all(word in str(refused.value) for word in words), refused.value


def test_links_have_the_stated_order():
    links = Links()
    size = 32 * 4096
    seconds = [
        link.seconds + size / link.bytes_per_second for link in (links.host, links.zone, links.far)
    ]
    assert seconds == sorted(seconds)
