"""Adapters and models that come to the device when they are asked for, and leave for others."""

import dataclasses
import gc
import shutil
import threading
import time
import types

import jax
import pytest
from harness import (
    ADAPTERS,
    FIXTURES,
    Agent,
    base_of,
    collect_tokens,
    oracle,
    request,
    shared_programs,
)

from bench.models import TINY, MemoryZoo
from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.factory import build_engine
from jblock.engine.graph.build import assemble
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

BASE, OTHER = "llama_gqa_untied", "llama_bf16"
MINE = [name for name in ADAPTERS if base_of(name) == BASE]
WIDE, NARROW, THIRD = "lora_all_r8", "lora_qv_r4", "lora_rslora_r16"
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=1,
    adapter_slots=2,
)


@pytest.fixture
def own_zoo(zoo, tmp_path):
    """A zoo of its own, which a test may damage or add to."""
    return shutil.copytree(zoo, tmp_path / "zoo")


def start(folder, zoo, names, **settings) -> ThreadEngine:
    """An engine over some chains, with the programs of all tests at hand."""
    store = Zoo.open(folder)
    config = dataclasses.replace(CONFIG, **settings)
    chains = {name: store.chain(name) for name in names}
    return ThreadEngine(store, chains, config, shared_programs())


def ask(engine, *models) -> dict[str, list[int]]:
    """Submits the oracle's prompt to each model; requests are named as their models."""
    for model in models:
        engine.submit(request(model, model, oracle(model)["prompt"]))
    return {model: oracle(model)["greedy"].tolist() for model in models}


def transcript(agent: Agent, model: str) -> list:
    agent.loop.submit(request("r", model, oracle(model)["prompt"], logprobs=True, max_tokens=20))
    outputs = agent.run()["r"]
    return [pair for o in outputs for pair in zip(o.token_ids, o.logprobs, strict=True)]


def test_bit_identical_from_the_start_on_demand_and_after_eviction(zoo):
    names = [BASE, *MINE]
    fresh = {n: transcript(Agent.make(zoo, [n], CONFIG), n) for n in (THIRD, NARROW)}
    agent = Agent.make(zoo, names, CONFIG)
    pointers = table_pointers(agent)
    seen = {}
    for name in [*names, THIRD, NARROW, *reversed(names)]:
        seen.setdefault(name, []).append(transcript(agent, name))
    assert all(turns.count(turns[0]) == len(turns) > 1 for turns in seen.values())
    # Alone, tables have other projections: another plan, so tokens only.
    for name, expected in fresh.items():
        assert [t for t, _ in seen[name][0]] == [t for t, _ in expected]
    stats = agent.loop.stats()
    assert stats.evictions > 0 and stats.adapters_resident <= CONFIG.adapter_slots
    assert table_pointers(agent) == pointers  # written in place


def table_pointers(agent: Agent) -> list[int]:
    tables = [t for i in agent.graph.instances for u in i.layers for t in u.tables]
    return [t[n].unsafe_buffer_pointer() for t in tables for n in sorted(t) if n != "pieces"]


def test_more_adapters_than_slots_in_one_batch(own_zoo, zoo):
    engine = start(own_zoo, zoo, [BASE, *MINE])
    assert engine.stats().adapters_resident == 0 and engine.stats().chains == 1 + len(MINE)
    for _ in range(2):
        expected = ask(engine, *MINE, BASE)
        assert collect_tokens(engine, expected) == expected
    stats = engine.stats()
    assert stats.compiles_on_serving_path == 0
    assert stats.adapters_resident == stats.chains_resident - 1 <= 2
    assert stats.loads - stats.evictions >= 2
    assert stats.host_hits > 0  # what came back came from the host
    engine.close()


class Gate:
    """Holds back one reader of the zoo, while it is shut."""

    def __init__(self, monkeypatch, method: str):
        self.reached, self.open = threading.Event(), threading.Event()
        original = getattr(Zoo, method)

        def slow(*args, **kwargs):
            self.reached.set()
            assert self.open.wait(60)
            return original(*args, **kwargs)

        monkeypatch.setattr(Zoo, method, slow)


def test_who_waits_for_an_adapter_holds_nobody_up(own_zoo, zoo, monkeypatch):
    engine = start(own_zoo, zoo, [BASE, *MINE])
    warm = ask(engine, NARROW)
    assert collect_tokens(engine, warm) == warm
    gate = Gate(monkeypatch, "load_delta")
    cold = ask(engine, WIDE)
    assert gate.reached.wait(60)
    others = ask(engine, BASE, NARROW)  # behind it in the queue
    assert collect_tokens(engine, others) == others
    gate.open.set()
    assert collect_tokens(engine, cold) == cold
    engine.close()


def test_a_model_is_read_when_it_is_asked_for(own_zoo, zoo):
    """Weights for one model only: the two take turns, and neither stops while the other is read."""
    size = _weight_bytes(own_zoo, BASE)
    engine = start(own_zoo, zoo, [BASE, OTHER], weights_memory_mb=-(-size // 10**6))
    weight_cache = engine._loop.weight_cache
    weight_cache._room.max_weight_bytes = int(1.5 * size)  # finer than megabytes
    evict(engine, OTHER)
    expected = ask(engine, BASE)
    assert collect_tokens(engine, expected) == expected
    for name in (OTHER, BASE, OTHER):
        expected = ask(engine, name)
        assert collect_tokens(engine, expected) == expected
        assert engine.stats().chains_resident == 1
    assert engine.stats().host_hits > 0
    assert engine.stats().resident_bytes <= 1.5 * size
    assert engine.stats().compiles_on_serving_path == 0
    engine.close()


def test_others_stream_while_a_model_is_read(own_zoo, zoo, monkeypatch):
    engine = start(own_zoo, zoo, [BASE, OTHER])
    evict(engine, OTHER)
    gate = Gate(monkeypatch, "load_component")
    cold = ask(engine, OTHER)
    assert gate.reached.wait(60)
    others = ask(engine, BASE)
    assert collect_tokens(engine, others) == others
    gate.open.set()
    assert collect_tokens(engine, cold) == cold
    engine.close()


def evict(engine: ThreadEngine, model: str) -> None:
    """Takes the weights of an unused model off the device, on the loop's thread."""
    done = threading.Event()

    def on_loop(loop):
        for weights in loop.graph.routes[model].weights.members:
            loop.weight_cache._evict(weights)
        done.set()

    engine._inbox.put(on_loop)
    assert done.wait(10)


def _weight_bytes(folder, name) -> int:
    store = Zoo.open(folder)
    chain = store.chain(name)
    return sum(store.component(s.component).nbytes for s in chain.steps)


def test_pinned_models_stay(own_zoo, zoo):
    engine = start(own_zoo, zoo, [BASE, *MINE], pinned=(WIDE,))
    assert engine.stats().adapters_resident == 1
    expected = ask(engine, *MINE)
    assert collect_tokens(engine, expected) == expected
    before = engine.stats()
    expected = ask(engine, WIDE)
    assert collect_tokens(engine, expected) == expected
    assert engine.stats().residency_hits == before.residency_hits + 1
    engine.close()
    with pytest.raises(ValueError, match="pinned names nobody"):
        build_engine(zoo=str(own_zoo), models=[BASE], pinned=["nobody"])


@pytest.mark.parametrize("what", ["record", "tensor"])
def test_a_damaged_adapter_fails_its_own_requests_only(own_zoo, zoo, what):
    chain = Zoo.open(own_zoo).chain(WIDE)
    deltas = [d for s in chain.steps for d in s.deltas]
    folder = own_zoo / "deltas" / deltas[-1]
    if what == "record":
        (folder / "spec.json").write_text("{}")
    else:
        file = folder / "params.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    engine = start(own_zoo, zoo, [BASE, *MINE])
    for _ in range(2):
        engine.submit(request("bad", WIDE, oracle(WIDE)["prompt"]))
        expected = ask(engine, BASE, NARROW)
        tokens: dict[str, list[int]] = {name: [] for name in expected}
        last = {}
        while len(last) < 3:
            for output in engine.poll(10):
                if output.finish_reason:
                    last[output.request_id] = output
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        assert last["bad"].error_code == "INTERNAL"
        assert WIDE in last["bad"].error_message and "damaged" in last["bad"].error_message
        assert {n: tokens[n] for n in expected} == expected
    stats = engine.stats()
    assert stats.load_failures == 2 and stats.adapters_resident == 1
    engine.close()


def test_unloaded_while_it_is_being_read(own_zoo, zoo, monkeypatch):
    engine = start(own_zoo, zoo, [BASE, WIDE])
    gate = Gate(monkeypatch, "load_delta")
    cold = ask(engine, WIDE)
    assert gate.reached.wait(60)
    assert [m.name for m in engine.serve([BASE])] == [BASE]
    gate.open.set()
    assert collect_tokens(engine, cold) == cold  # bound to what was served when it came
    engine.submit(request("late", WIDE, [5]))
    (output,) = engine.poll(10)
    assert output.error_code == "NOT_FOUND"
    deadline = time.monotonic() + 10
    while engine.stats().adapters_resident and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().adapters_resident == 0
    engine.close()


def test_an_adapter_that_adapts_more_than_was_known(own_zoo, zoo):
    """Its first delta says q and v alone; the others adapt everything. Tables follow in the background."""
    store = Zoo.open(own_zoo)
    wide, narrow = store.chain(WIDE), store.chain(NARROW)
    steps, seen = [], set()
    for mine, theirs in zip(narrow.steps, wide.steps, strict=True):
        kind = store.component(mine.component).spec.kind
        steps.append(
            Step(component=mine.component, deltas=(theirs if kind in seen else mine).deltas)
        )
        seen.add(kind)
    store.publish(dataclasses.replace(wide, name="mixed", steps=tuple(steps)))
    prompt = oracle(WIDE)["prompt"]
    known = Agent.make(own_zoo, ["mixed", WIDE], CONFIG)
    expected = known.generate({"r": ("mixed", prompt)})["r"]
    engine = start(own_zoo, zoo, [BASE, "mixed"])
    engine.submit(request("mixed", "mixed", prompt))
    others = ask(engine, BASE)
    assert collect_tokens(engine, ["mixed", BASE]) == {"mixed": expected} | others
    assert engine.stats().compiles_on_serving_path == 0
    engine.close()


def test_a_new_version_does_not_get_the_old_ones_weights_evicted_in_use(own_zoo, zoo):
    engine = start(own_zoo, zoo, [BASE, OTHER])
    prompt = oracle(BASE)["prompt"]
    engine.submit(request("old", BASE, prompt))
    while not (outputs := engine.poll(10)):
        pass
    hf.convert(FIXTURES / "hf" / OTHER, own_zoo, BASE, Progress(False, quiet=True))
    engine.serve([BASE])
    assert collect_tokens(engine, ["old"], outputs)["old"] == oracle(BASE)["greedy"].tolist()
    engine.close()


def arrays_of(root) -> set[int]:
    """The ids of the arrays that an object holds, over all that it refers to but code."""
    found, seen, left = set(), set(), [root]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, (type, types.ModuleType)):
            continue
        seen.add(id(x))
        if isinstance(x, jax.Array):
            found.add(id(x))
        elif isinstance(x, types.FunctionType):
            left += [*(x.__closure__ or ()), *(x.__defaults__ or ())]
        else:
            left += gc.get_referents(x)
    return found


def test_a_thousand_registered_cost_records_only():
    """Wiring them reads one delta record each, no tensor, and holds no more arrays than for ten."""
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    for i in range(1000):
        zoo.add_adapter(f"lora-{i}", "base", 8)
    read = []
    original = zoo.delta
    zoo.delta = lambda id: read.append(id) or original(id)
    zoo.load_delta = zoo.load_component = None  # nobody may call them
    config = EngineConfig(adapter_slots=4)
    ten = {name: zoo.served[name] for name in list(zoo.served)[:10]}
    arrays = []
    for chains in (ten, zoo.served):
        found = assemble(zoo, chains, config)
        arrays.append(len(arrays_of(found)))
        assert len(found.routes) == len(chains)
        assert len({id(r.weights) for r in found.routes.values()}) == 1
    assert arrays[0] == arrays[1] > 0 and len(read) <= 9 + 1000
