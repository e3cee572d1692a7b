"""Service is shared out among tenants: levels, lifts, order, who gives way, deadlines; only time
is pretended."""

import collections
import dataclasses

import pytest

from bench.simulated import Costs, SimulatedEngine, request
from jblock.engine.scheduling.deadlines import deadline_problem
from jblock.engine.scheduling.fairness import VirtualTokenCounter
from jblock.engine.scheduling.step_budget import Times

COSTS = Costs(decode=Times((1, 4, 16, 32), (0.02, 0.022, 0.03, 0.04)), chunks={16: 0.01, 64: 0.025})


class Served:
    """Seconds of service by tenant."""

    def __init__(self):
        self.seconds = collections.Counter()

    def __call__(self, one, seconds, tokens):
        self.seconds[one.tenant] += seconds


def simulated(**options):
    served = Served()
    engine = SimulatedEngine(COSTS, served=served, **{"kv_tokens": 400, **options})
    return engine, served.seconds


def flood(engine, tenant, count, prompt=16, output=32, weight=1.0, **fields):
    for i in range(count):
        engine.submit(request(f"{tenant}{i}", tenant, prompt, output, weight, **fields))


def run(engine, steps):
    brought = collections.Counter()
    for _ in range(steps):
        brought.update(engine.step())
    return brought


def finish(engine, most=5000):
    steps = 0
    while list(engine.scheduler):
        engine.step()
        steps += 1
        assert steps < most
    kv = engine.scheduler.kv
    assert all(pool.num_free == pool.total for pool in kv.pools.values())
    assert engine.scheduler.rows.num_free == engine.scheduler.rows.total


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_that_always_wait_are_served_by_weight(weight):
    engine, seconds = simulated()
    flood(engine, "many", 400)
    flood(engine, "few", 150, weight=weight)
    run(engine, 300)
    waiting = {name: count for name, count, _, _ in engine.scheduler.counter.snapshot()}
    assert waiting["many"] and waiting["few"]
    bound = 2 * COSTS.token_seconds * 400
    assert abs(seconds["few"] / weight - seconds["many"]) <= bound
    assert seconds["few"] + seconds["many"] > 4 * bound


def test_one_queue_serves_who_came_first():
    engine, _ = simulated()
    for i in range(300):
        engine.submit(request(f"r{i}", "", 16, 32))
    order = []
    while len(order) < 300:
        for one in list(engine.scheduler):
            if one.seq_slot >= 0 and one.request.request_id not in order:
                order.append(one.request.request_id)
        engine.step()
    assert order[:100] == [f"r{i}" for i in range(100)]


def test_who_comes_back_is_level_with_those_that_wait():
    counter = VirtualTokenCounter()
    counter.arrive("a", 1.0)
    counter.charge("a", 10.0)
    counter.arrive("b", 1.0)
    assert counter.level("b") == 10.0  # No credit for the time that it was not there.
    counter.charge("b", 5.0)
    counter.arrive("b", 1.0)
    assert counter.level("b") == 15.0  # Nothing is lifted of who is there.
    counter.withdraw("a")
    counter.withdraw("b")
    counter.withdraw("b")
    counter.arrive("c", 1.0)
    assert counter.level("c") == 15.0  # That of the last one that was there.
    counter.charge("c", 30.0)
    counter.withdraw("c")
    counter.arrive("a", 2.0)
    assert counter.level("a") == 45.0
    counter.charge("a", 8.0)
    assert counter.level("a") == 49.0


def test_tenants_without_anything_open_are_forgotten_in_the_end():
    counter = VirtualTokenCounter()
    counter.arrive("busy", 1.0)
    for i in range(3000):
        counter.arrive(f"t{i}", 1.0)
        counter.withdraw(f"t{i}")
    assert len(counter.snapshot()) <= 1002
    assert any(name == "busy" for name, *_ in counter.snapshot())


def test_nothing_idles_for_a_tenant_that_is_not_there():
    engine, _ = simulated()
    flood(engine, "only", 60)
    finish(engine)
    alone = engine.now
    other, _ = simulated()
    for i in range(60):
        other.submit(request(f"r{i}", f"t{i % 7}", 16, 32))
    finish(other)
    assert other.now <= 1.1 * alone


def test_what_the_cache_has_is_free():
    engine, _ = simulated(kv_tokens=4000)
    prompt = list(range(100, 164))
    engine.submit(request("first", "a", prompt, 1))
    finish(engine)
    level = engine.scheduler.counter.level("a")
    engine.submit(request("second", "a", prompt, 1))
    finish(engine)
    again = engine.scheduler.counter.level("a") - level
    assert again < 0.5 * level
    engine.submit(request("third", "b", prompt, 1))  # Another tenant finds nothing of it.
    before = engine.scheduler.counter.level("b")
    finish(engine)
    assert engine.scheduler.counter.level("b") - before == pytest.approx(level)


def probed(salts):
    """What a tenant can measure of its prompt after another one asked the same: steps, seconds, tokens found,
    and what it was charged."""
    engine, _ = simulated(kv_tokens=4000)
    prompt = list(range(100, 300))
    for name, salt in zip(("victim", "prober"), salts, strict=True):
        if salt is None:
            continue
        steps, begin, hits = 0, engine.now, engine.scheduler.kv.hit_tokens
        one = dataclasses.replace(request(name, name, prompt, 1), cache_salt=salt)
        engine.submit(one)
        while list(engine.scheduler):
            engine.step()
            steps += 1
    found = engine.scheduler.kv.hit_tokens - hits
    served = {name: seconds for name, _, _, seconds in engine.scheduler.counter.snapshot()}
    return steps, engine.now - begin, found, served["prober"]


def test_nobody_measures_what_another_tenant_has_asked():
    nobody_asked = probed((None, "b"))
    assert probed(("a", "b")) == pytest.approx(nobody_asked)
    both_opted_in = probed(("shared", "shared"))
    assert both_opted_in[2] > 0 and both_opted_in[1] < nobody_asked[1]


def test_a_tenant_with_nothing_running_does_not_wait_for_long_answers():
    engine, _ = simulated(kv_tokens=8000, max_num_seqs=8)
    flood(engine, "flood", 40, output=400)
    run(engine, 20)
    engine.submit(request("one", "calm", 16, 4))
    assert run(engine, 3)["one"] >= 1
    finish(engine, most=20000)


def test_preemption_takes_from_the_most_served():
    engine, _ = simulated(kv_tokens=160, max_num_seqs=8)
    flood(engine, "small", 1, prompt=16, output=60)
    flood(engine, "big", 3, prompt=16, output=60)
    preempted = collections.Counter()
    original = engine.scheduler.preempt

    def preempt(sequence):
        counter, own = engine.scheduler.counter, sequence.request.tenant
        rivals = {s.request.tenant for s in engine.scheduler.running.values()}
        most = max(counter.level(name) for name in rivals)
        assert counter.level(own) >= most - 76 * COSTS.token_seconds
        preempted[own] += 1
        original(sequence)

    engine.scheduler.preempt = preempt
    finish(engine)
    assert preempted["big"] > 0 == preempted["small"]


def test_recomputing_what_was_preempted_is_not_charged():
    engine, seconds = simulated(kv_tokens=120, max_num_seqs=8)
    flood(engine, "a", 4, prompt=16, output=60)
    finish(engine)
    assert engine.scheduler.preemptions > 0
    charged = engine.scheduler.counter.snapshot()[0][3]
    assert charged == pytest.approx(seconds["a"], rel=0.05)


def order_of(*requests):
    engine, _ = simulated(max_num_seqs=1)
    engine.submit(request("running", "t", 4, 2))
    engine.step()
    for one in requests:
        engine.submit(one)
    order = []
    while list(engine.scheduler):
        for request_id in engine.step():
            if request_id not in order:
                order.append(request_id)
    return order[1:]


def timed(request_id, deadline, tenant="t", priority=0):
    return request(request_id, tenant, 4, 2, deadline=deadline, priority=priority)


def test_within_a_tenant_the_earliest_deadline_goes_first():
    order = order_of(
        timed("none", None), timed("late", 100.0), timed("soon", 50.0), timed("none2", None)
    )
    assert order == ["soon", "late", "none", "none2"]


def test_a_more_urgent_priority_goes_before_all_others():
    order = order_of(
        timed("plain", None), timed("background", None, priority=5), timed("urgent", None, "u", -1)
    )
    assert order == ["urgent", "plain", "background"]


def test_a_deadline_that_measured_times_cannot_meet():
    engine, _ = simulated()
    for name, deadline in (("impossible", 0.5), ("possible", 3600.0)):
        engine.submit(request(name, "t", 64, 1000, deadline=deadline))
    impossible = engine.scheduler.find("impossible")
    needs = impossible.deadline - impossible.latest_start
    assert needs == pytest.approx(COSTS.chunks[64] + 999 * COSTS.token_seconds)
    # The least it takes is over a second, of half a one: it would have had to start before it came.
    late = engine.scheduler.waiting.too_late(impossible.deadline - 0.5)
    assert [s.request.request_id for s in late] == ["impossible"]
    assert deadline_problem(late[0]).startswith(
        "deadline: 0.5 s were given, and this request takes"
    )


def test_prompts_of_a_flood_do_not_hold_up_another_tenants():
    engine, _ = simulated(kv_tokens=20000)
    flood(engine, "flood", 40, prompt=640, output=2)
    run(engine, 3)
    engine.submit(request("one", "calm", 128, 1))
    steps = 0
    while "one" not in engine.step():
        steps += 1
    assert steps <= 8  # Two chunks of its own, in turn with the flood's, of which there are 400.
