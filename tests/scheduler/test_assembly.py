"""Adaptive assembly: which way a request goes, by small fleets written out."""

import dataclasses
import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.scheduler.assembly import assemble
from jblock.scheduler.itinerary import Budget, NoRouteError, Report, Transfer, Work
from jblock.scheduler.substitutes import measured_together, substitutes
from jblock.zoo.edge_records import Edge, Probe, Score
from jblock.zoo.records import Chain, Step


def id_(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def steps(names: str) -> tuple[Step, ...]:
    return tuple(Step(component=id_(n)) for n in names.split())


CHAIN = Chain(
    name="m",
    version=1,
    family="llama",
    steps=steps("e a b c n h"),
    tokenizer=None,
    max_position=64,
    vocab_size=8,
)
WORK = Work(prompt_tokens=10, new_tokens=10)
NEAR = Budget(policy="near", damage=0.1)
WIDE = Budget(policy="adaptive", damage=0.1)


def edge(original: str, substitute: str, kl: float, kind="equivalent", chain="m@1") -> Edge:
    """Measured in a chain; the interval's worse end is `kl`."""
    return Edge(
        kind=kind,
        original=steps(original),
        substitute=steps(substitute),
        scores={"kl": Score(value=kl / 2, low=0.0, high=kl, count=100)},
        chain=chain,
        probe=Probe(name="text", digest=id_("text"), tokens=100),
    )


def report(agent: str, names: str, **more) -> Report:
    named = {field: {id_(k): v for k, v in value.items()} for field, value in more.items()}
    return Report(agent=agent, step_seconds={id_(n): 0.01 for n in names.split()}, **named)


def links(*agents: str, row=1e-3, kv=1e-3) -> dict[tuple[str, str], Transfer]:
    return {
        pair: Transfer(row_seconds=row, kv_token_seconds=kv)
        for pair in itertools.permutations(agents, 2)
    }


def names(itinerary) -> str:
    known = {id_(n): n for n in ["e", "a", "b", "c", "n", "h", "A", "B", "C", "s", "S"]}
    return " ".join(known[s.component] for s in itinerary.steps)


def test_one_agent_is_one_exact_span():
    found = assemble(CHAIN, WIDE, [], [report("x", "e a b c n h")], {}, WORK)
    (span,) = found.spans
    assert (span.agent, span.steps, found.home) == ("x", CHAIN.steps, "x")
    assert (found.policy, found.damage, found.edges) == ("exact", 0.0, ())
    assert found.seconds == pytest.approx(20 * 6 * 0.01)


def test_a_busy_block_is_passed_over_only_by_who_accepts_it():
    """Off by default; within the budget; and by the policy that the edge needs."""
    busy = [report("x", "e a b c n h B", queue_seconds={"b": 1.0})]
    one = edge("b", "B", 0.05)
    found = assemble(CHAIN, NEAR, [one], busy, {}, WORK)
    assert names(found) == "e a B c n h"
    assert (found.policy, found.damage, found.edges) == ("near", 0.05, (one.id,))
    adaptive = edge("b", "B", 0.05, kind="surrogate")
    exact = [
        (Budget(), one),
        (Budget(policy="near", damage=0.04), one),
        (NEAR, adaptive),
        (NEAR, edge("b", "B", 0.05, chain="other@1")),
        (NEAR, edge("b", "B", 0.05, chain="m@2")),
        (Budget(policy="near", damage=0.1, measure="accuracy_change"), one),
    ]
    for budget, by in exact:
        assert names(assemble(CHAIN, budget, [by], busy, {}, WORK)) == "e a b c n h"
    assert assemble(CHAIN, WIDE, [adaptive], busy, {}, WORK).policy == "adaptive"
    idle = [report("x", "e a b c n h B")]
    assert assemble(CHAIN, NEAR, [one], idle, {}, WORK).policy == "exact"


def test_an_absent_block_is_passed_over_for_a_resident_one():
    one = edge("b", "B", 0.05)
    slow = [report("x", "e a b c n h B", load_seconds={"b": 60.0})]
    assert names(assemble(CHAIN, NEAR, [one], slow, {}, WORK)) == "e a B c n h"
    lacks = [report("x", "e a c n h B")]
    assert names(assemble(CHAIN, NEAR, [one], lacks, {}, WORK)) == "e a B c n h"
    with pytest.raises(NoRouteError, match=f"step 2, component {id_('b')}"):
        assemble(CHAIN, Budget(), [one], lacks, {}, WORK)


def test_a_stitched_run_takes_the_place_of_another_length():
    stitched = edge("a b c", "s B S", 0.02, kind="stitch")
    here = [report("x", "e a b c n h s B S", queue_seconds={"a": 1.0, "c": 1.0})]
    found = assemble(CHAIN, WIDE, [stitched], here, {}, WORK)
    assert names(found) == "e s B S n h" and found.damage == 0.02
    longer = edge("b", "s B S", 0.02, kind="stitch")
    found = assemble(CHAIN, WIDE, [longer], [report("x", "e a c n h s B S")], {}, WORK)
    assert names(found) == "e a s B S c n h"


def test_damage_is_summed_unless_it_was_measured_together():
    busy = [report("x", "e a b c n h A C", queue_seconds={"a": 1.0, "c": 0.5})]
    a, c = edge("a", "A", 0.06), edge("c", "C", 0.06)
    found = assemble(CHAIN, NEAR, [a, c], busy, {}, WORK)
    assert names(found) == "e A b c n h"  # one of them, that with the longer queue
    joint = edge("a b c", "A b C", 0.07)
    found = assemble(CHAIN, NEAR, [a, c, joint], busy, {}, WORK)
    assert names(found) == "e A b C n h" and found.damage == 0.07
    # Worse together than their sum: that counts as well.
    a, c = edge("a", "A", 0.02), edge("c", "C", 0.02)
    assert assemble(CHAIN, NEAR, [a, c], busy, {}, WORK).damage == 0.04
    worse = edge("a b c", "A b C", 0.5)
    found = assemble(CHAIN, NEAR, [a, c, worse], busy, {}, WORK)
    assert names(found) in ("e A b c n h", "e a b C n h") and found.damage == 0.02
    both = substitutes(CHAIN, [a, c, worse], "kl")
    assert measured_together(CHAIN, both[:2], both) == 0.5


def test_spans_take_the_quickest_agents():
    x = report("x", "e a b n h", queue_seconds={"b": 1.0})
    y = report("y", "b c")
    found = assemble(CHAIN, Budget(), [], [x, y], links("x", "y"), WORK)
    assert [(s.agent, len(s.steps)) for s in found.spans] == [("x", 2), ("y", 2), ("x", 2)]
    with pytest.raises(NoRouteError, match="no links join"):
        assemble(CHAIN, Budget(), [], [x, y], {}, WORK)
    # A hop that takes longer than the queue is not made twice.
    far = assemble(
        CHAIN,
        Budget(),
        [],
        [x, report("y", "b c"), report("z", "c")],
        links("x", "y", row=5.0) | links("x", "z"),
        WORK,
    )
    assert {s.agent for s in far.spans} == {"x", "z"}


def test_the_owner_of_the_prompts_pages_is_preferred_until_its_queue_costs_more():
    long = Work(prompt_tokens=1000, new_tokens=1)
    cached = dict.fromkeys(["e", "a", "b", "c", "n", "h"], 1000)
    idle = report("x", "e a b c n h")
    owner = report("y", "e a b c n h", cached_tokens=cached)
    slow_link = links("x", "y", kv=1.0)
    found = assemble(CHAIN, Budget(), [], [idle, owner], slow_link, long)
    assert {s.agent for s in found.spans} == {"y"}
    queue = dict.fromkeys(cached, 20.0)
    busy = dataclasses.replace(owner, queue_seconds={id_(k): v for k, v in queue.items()})
    found = assemble(CHAIN, Budget(), [], [idle, busy], slow_link, long)
    assert {s.agent for s in found.spans} == {"x"}
    anew = found.seconds
    pulled = assemble(CHAIN, Budget(), [], [idle, busy], links("x", "y", kv=1e-3), long)
    assert pulled.seconds < anew / 5


def test_pages_are_not_counted_behind_a_substitute():
    cached = dict.fromkeys(["e", "a", "b", "c", "n", "h"], 1000)
    here = report("x", "e a b c n h B", cached_tokens=cached, queue_seconds={"b": 0.5})
    long = Work(prompt_tokens=1000, new_tokens=10)
    # Skipping the queue saves 5 s; computing b, c, n and h of the prompt anew would take 40.
    assert assemble(CHAIN, NEAR, [edge("b", "B", 0.01)], [here], {}, long).policy == "exact"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_budget_is_never_overdrawn(data):
    pool = [
        edge(o, s, d)
        for o, s, d in (
            ("a", "A", 0.03),
            ("b", "B", 0.05),
            ("c", "C", 0.04),
            ("a b", "A B", 0.2),
            ("b c", "B C", 0.06),
        )
    ]
    edges = data.draw(st.lists(st.sampled_from(pool), unique_by=lambda e: e.id))
    most = data.draw(st.sampled_from([0.0, 0.03, 0.05, 0.07, 0.1, 0.3]))
    queue = {n: data.draw(st.sampled_from([0.0, 0.1, 2.0])) for n in "abcABC"}
    reports = [report("x", "e a b c n h A B C", queue_seconds=queue), report("y", "a b A C")]
    found = assemble(
        CHAIN, Budget(policy="near", damage=most), edges, reports, links("x", "y"), WORK
    )
    used = [s for s in substitutes(CHAIN, edges, "kl") if s.edge in found.edges]
    together = measured_together(CHAIN, used, substitutes(CHAIN, edges, "kl"))
    assert found.damage == pytest.approx(together) and found.damage <= most
    exact = assemble(CHAIN, Budget(), edges, reports, links("x", "y"), WORK)
    assert found.seconds <= exact.seconds and exact.steps == CHAIN.steps


def test_budgets_meet_and_are_checked():
    assert WIDE.and_(Budget(policy="near", damage=0.3)) == Budget(policy="near", damage=0.1)
    assert WIDE.and_(Budget()) == Budget()
    assert WIDE.and_(Budget(policy="near", damage=1, measure="accuracy_change")) == Budget()
    for wrong, says in (
        ({"policy": "any"}, "any"),
        ({"damage": -1}, "-1"),
        ({"damage": float("nan")}, "nan"),
        ({"measure": "perplexity_change"}, "accuracy_change"),
    ):
        with pytest.raises(ValueError, match=says):
            Budget(**wrong)
