"""A trunk that chains share is prefilled once: with what it left and without, every bit is the same."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import fake_devices
import pytest
from harness import request, shared_programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.models import TINY, MemoryZoo
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.spec import RowShape
from jblock.engine.loop import Loop
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling.step_budget import NO_LIMIT

PAGE = 16
# One grid for decoding and one for prefill: one execution plan, wherever a prompt is cut.
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=PAGE,
    decode_sizes=(4,),
    prefill_grids=((4, 32),),
    kv_memory_mb=4,
    host_kv_memory_mb=4,
    adapter_slots=4,
    step_ms=NO_LIMIT,
)
UPPER = ["base", "tune", "other", "last", "upper-lora"]
MODELS = [*UPPER, "full-lora", "tune-lora"]


def make_zoo() -> MemoryZoo:
    """Four layers. "tune" and "other" have two of their own, "last" one; "upper-lora" adapts the upper two of
    the base, "tune-lora" the last of "tune", "full-lora" all."""
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    zoo.add_variant("tune", "base", 2)
    zoo.add_variant("other", "base", 2)
    zoo.add_variant("last", "base", 1)
    zoo.add_adapter("upper-lora", "base", 4, first_layer=2)
    zoo.add_adapter("full-lora", "base", 4)
    zoo.add_adapter("tune-lora", "tune", 4, first_layer=3)
    return zoo


class Agent:
    """A loop on the test's own thread."""

    def __init__(self, cache, zoo=None, models=MODELS, config=CONFIG):
        self.zoo = zoo or make_zoo()
        chains = {name: self.zoo.served[name] for name in models}
        self.graph = assemble(self.zoo, chains, config)
        self.device = Runner(self.graph, config, cache)
        self.loop = Loop(self.graph, self.device, config)
        self.loop.loads.preload([r.needs for r in self.graph.routes.values()])
        self.count = 0

    def submit(self, model, prompt, salt="", **options) -> str:
        self.count += 1
        made = request(str(self.count), model, prompt, logprobs=True, **options)
        self.loop.submit(dataclasses.replace(made, cache_salt=salt))
        return made.request_id

    def run(self) -> dict[str, list]:
        found: dict[str, list] = {}
        while not self.loop.idle:
            for output in self.loop.step():
                assert not output.error_message, output
                pairs = zip(output.token_ids, output.logprobs, strict=True)
                found.setdefault(output.request_id, []).extend(pairs)
        return found

    def ask(self, model, prompt, salt="", **options) -> list:
        return self.run_one(self.submit(model, prompt, salt, **options))

    def run_one(self, request_id) -> list:
        return self.run()[request_id]

    def alone(self, model, prompt, **options) -> list:
        """The answer of a tenant who never asked before."""
        return self.ask(model, prompt, f"alone{self.count}", **options)

    @property
    def trunk_tokens(self) -> int:
        return self.loop.kv.trunk_tokens


@pytest.fixture(scope="module")
def cache() -> ExecutableCache:
    return shared_programs()


@pytest.fixture(scope="module")
def agent(cache) -> Agent:
    return Agent(cache)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple((37 * i * (seed + 1) + 11 * seed + i * i) % 256 for i in range(length))


def test_boundaries_lie_where_chains_part(agent):
    places = {
        name: [(sum(b.below.values()), b.shape) for b in route.boundaries]
        for name, route in agent.graph.routes.items()
    }
    row = RowShape(TINY.hidden_size)
    assert places["tune"] == places["tune-lora"] == [(2, row), (3, row)]
    assert places["other"] == places["upper-lora"] == [(2, row)]
    assert places["base"] == places["last"] == [(2, row), (3, row)]
    assert places["full-lora"] == []
    # Adapters cut no block: their boundary lies between two layers of one.
    assert any(b.layer for b in agent.graph.routes["tune-lora"].boundaries)


def test_a_single_chain_keeps_no_rows(cache):
    alone = Agent(cache, models=["tune"])
    assert not alone.graph.routes["tune"].boundaries
    assert not any(isinstance(shape, RowShape) for shape in alone.device.pool_shapes)


@pytest.mark.parametrize("length", [1, 16, 17, 63, 64, 100])
def test_what_another_fine_tune_left_is_found_and_changes_no_bit(agent, length):
    asked = prompt(length, length)
    wanted = {model: agent.alone(model, asked, max_tokens=5) for model in UPPER}
    salt = f"tenant{length}"
    assert agent.ask("base", asked, salt, max_tokens=5) == wanted["base"]
    for model in UPPER[1:]:
        before, computed = agent.trunk_tokens, agent.loop.stats().cached_tokens
        assert agent.ask(model, asked, salt, max_tokens=5) == wanted[model]
        full = length // PAGE * PAGE if length > 1 else 0
        assert agent.trunk_tokens - before == full
        assert agent.loop.stats().cached_tokens == computed


def test_another_tenant_finds_nothing(agent):
    asked = prompt(3, 80)
    agent.ask("tune", asked, "one", max_tokens=1)
    before = agent.trunk_tokens
    agent.ask("other", asked, "two", max_tokens=1)
    assert agent.trunk_tokens == before


def test_scored_prompts_are_computed_whole(agent):
    asked = prompt(4, 80)
    agent.ask("tune", asked, "scores", max_tokens=1)
    before = agent.trunk_tokens
    agent.ask("other", asked, "scores", max_tokens=1, prompt_logprobs=True)
    assert agent.trunk_tokens == before


def test_who_asks_at_the_same_time_waits_for_the_trunk(agent):
    asked = prompt(5, 96)
    wanted = {model: agent.alone(model, asked, max_tokens=3) for model in UPPER}
    before, rows = agent.trunk_tokens, agent.loop.stats().prompt_tokens
    ids = {model: agent.submit(model, asked, "crowd", max_tokens=3) for model in UPPER}
    found = agent.run()
    assert {model: found[id_] for model, id_ in ids.items()} == wanted
    assert agent.trunk_tokens - before == 4 * 96
    assert agent.loop.stats().prompt_tokens - rows == 5 * 96


def test_a_part_of_a_trunk_is_found_too(agent):
    """A longer beginning at the lower boundary than at the upper one, and a longer one there than of the
    whole chain."""
    asked = prompt(6, 150)
    wanted = agent.alone("last", asked, max_tokens=3)
    agent.ask("last", asked[:34], "parts", max_tokens=1)
    agent.ask("base", asked[:66], "parts", max_tokens=1)
    agent.ask("other", asked[:114], "parts", max_tokens=1)
    before, cached = agent.trunk_tokens, agent.loop.stats().cached_tokens
    sequence_id = agent.submit("last", asked, "parts", max_tokens=3)
    agent.loop.step()
    (sequence,) = agent.loop._sequences.running.values()
    assert [(e.until, e.number) for e in sequence.pages.entries] == [(64, 1), (112, 0)]
    assert agent.run_one(sequence_id) == wanted
    assert agent.loop.stats().cached_tokens - cached == 32
    assert agent.trunk_tokens - before == 112 - 32


def test_rows_give_way_to_nobody_and_nobody_to_them(agent):
    """All pages of rows are free or cached when nothing runs, and none has two keys."""
    pool = agent.loop.kv.pools[RowShape(TINY.hidden_size)]
    assert pool.num_free == pool.total > 0


def read_tokens(loop: Loop) -> None:
    """So that nothing is in flight when a sequence gives way, as when the loop has it give way."""
    before, loop._in_flight = loop._in_flight, None
    if before is not None:
        loop._collect(before)


arrivals = st.lists(
    st.tuples(
        st.sampled_from(MODELS),
        st.integers(0, 1),  # prompt
        st.sampled_from([1, 16, 17, 33, 64, 90, 140]),  # how much of it
        st.sampled_from([1, 2, 4]),  # tokens to generate: none needs another page
        st.integers(0, 10),  # step it arrives at
        st.sampled_from([None, None, None, 0, 2, 5]),  # steps until it is cancelled
    ),
    min_size=2,
    max_size=12,
)
events = st.dictionaries(
    st.integers(0, 14), st.sampled_from(["preempt", "start over", "forget"]), max_size=4
)


@pytest.fixture(scope="module")
def small(cache) -> Agent:
    """Few pages, and steps that end between two layers."""
    config = dataclasses.replace(CONFIG, kv_pages=100)
    agent = Agent(cache, config=config)
    while agent.loop.measure():
        pass
    profile = agent.loop.profile
    profile._seconds = {name: 1e4 * s for name, s in profile._seconds.items()}
    profile.forget()
    return agent


@pytest.fixture(scope="module")
def known() -> dict:
    return {}


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    arrivals=arrivals,
    events=events,
    step_ms=st.sampled_from([1, NO_LIMIT]),
    offloads=st.booleans(),
    rows=st.sampled_from([0, 3, 40]),
)
def test_with_a_cache_as_without(agent, small, known, arrivals, events, step_ms, offloads, rows):
    """Random chains, prompts, preemptions by offload and by computing anew, and few pages of rows. Tokens
    that were generated are never computed anew: as a prompt's they would go on another grid."""
    loop, wanted, outputs, cancelled = small.loop, {}, {}, set()
    loop.config = dataclasses.replace(loop.config, step_ms=step_ms)
    fast = Rates(copy_bytes=1e15, prefill_tokens=1.0)
    slow = Rates(copy_bytes=1.0, prefill_tokens=1e15)
    small.device.rates = fast if offloads else slow
    row_pool = loop.kv.pools[RowShape(TINY.hidden_size)]
    held = row_pool.allocate(max(row_pool.num_free - rows, 0))
    salt, longest = f"example{small.count}", small.device.longest_bytes(small.graph)
    pending, step = dict(enumerate(arrivals)), 0
    while pending or not loop.idle:
        for i, (model, which, length, tokens, at, leaves) in list(pending.items()):
            if at <= step:
                del pending[i]
                asked = prompt(which, length)
                key = (model, asked, tokens)
                if key not in known:
                    known[key] = agent.alone(model, asked, max_tokens=tokens)
                id_ = small.submit(model, asked, salt, max_tokens=tokens)
                wanted[id_] = known[key]
                if leaves is not None:
                    cancelled.add((step + leaves, id_))
        for at, id_ in cancelled:
            if at == step:
                loop.cancel(id_)
        if step in events:
            read_tokens(loop)
        running = list(loop._sequences.running.values())
        fresh = [s for s in running if not s.sampled]
        match events.get(step):
            case "preempt" if running and offloads and loop.kv.host.fits(longest):
                loop._sequences.preempt(running[len(running) // 2])
            case "preempt" if fresh:
                loop._sequences.preempt(fresh[len(fresh) // 2])
            case "start over" if fresh and len(fresh) == len(running):
                loop._sequences.start_over()
            case "forget":
                row_pool.free(row_pool.allocate(row_pool.num_free))
        for output in loop.step():
            outputs.setdefault(output.request_id, []).append(output)
        step += 1
    row_pool.free(held)
    assert row_pool.num_free == row_pool.total
    assert all(pool.num_free == pool.total for pool in loop.kv.pools.values())
    assert not loop.kv._computing
    left = {id_ for _, id_ in cancelled}
    for id_, expected in wanted.items():
        got = [p for o in outputs[id_] for p in zip(o.token_ids, o.logprobs, strict=True)]
        assert not outputs[id_][-1].error_message
        assert got == (expected[: len(got)] if id_ in left else expected)


TWO_DEVICES = """
import sys
from pathlib import Path
import test_trunk as t

config = t.dataclasses.replace(t.CONFIG, mesh="tp=2")
cache = t.ExecutableCache(Path(sys.argv[1]))
agent = t.Agent(cache, config=config, models=["base", "tune", "upper-lora"])
asked = t.prompt(1, 100)
wanted = {m: agent.alone(m, asked, max_tokens=4) for m in agent.graph.routes}
assert {m: agent.ask(m, asked, max_tokens=4) for m in agent.graph.routes} == wanted
print(agent.trunk_tokens, len(agent.device.placement.devices))
"""


@pytest.mark.long
def test_over_two_devices(tmp_path):
    env = os.environ | {"XLA_FLAGS": fake_devices.flags(2)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", TWO_DEVICES, str(tmp_path / "programs")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [str(2 * 96), "2"]
