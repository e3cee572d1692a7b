"""What fails, fails alone: messages, loads and reads of a real engine, and a process under real requests."""

import concurrent.futures
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import pytest
from harness import shared_programs

from bench.models import TINY, MemoryZoo, save
from jblock.blocks.delta_spec import LoraSpec, LoraTarget
from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

LONG = 120.0
SETTINGS = {
    "max_num_seqs": 4,
    "max_model_len": 128,
    "page_size": 16,
    "decode_sizes": (4,),
    "prefill_grids": ((1, 16),),
    "kv_memory_mb": 4,
}


def uneven(zoo: MemoryZoo, name: str) -> None:
    """An adapter whose first layer adapts fewer projections than the others."""
    steps, layer = [], 0
    for step in zoo.served["base"].steps:
        deltas = ()
        if zoo.component(step.component).spec.kind == "attention":
            names = ("q", "v") if layer == 0 else ("q", "k", "v")
            layer += 1
            spec = LoraSpec(targets={n: LoraTarget(rank=8, scale=0.5) for n in names})
            deltas = (zoo._delta(spec, step.component, name),)
        steps.append(Step(component=step.component, deltas=deltas))
    zoo._publish(name, tuple(steps), "base@1")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A zoo on disk: a base, even adapters and an uneven one."""
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    for name in ("a", "b", "c"):
        zoo.add_adapter(name, "base", 8)
    uneven(zoo, "uneven")
    return save(zoo, tmp_path_factory.mktemp("contained") / "zoo")


@pytest.fixture
def running(stored, tmp_path):
    """Makes an engine over a zoo of its own."""
    made = []

    def make(names, **settings) -> tuple[ThreadEngine, Path]:
        folder = shutil.copytree(stored, tmp_path / "zoo")
        zoo = Zoo.open(folder)
        config = EngineConfig(**{**SETTINGS, **settings})
        engine = ThreadEngine(zoo, {n: zoo.chain(n) for n in names}, config, shared_programs())
        made.append(engine)
        return engine, folder

    yield make
    for engine in made:
        engine.close()


def ask(engine, model: str, name: str = "r", count: int = 4, **sampling) -> None:
    params = SamplingParams(max_tokens=count, ignore_eos=True, **sampling)
    engine.submit(Request(request_id=name, model=model, token_ids=(5, 6, 7), sampling=params))


def answers(engine, names) -> dict[str, tuple[list[int], str]]:
    """Tokens of each request and its error, if any."""
    tokens = {name: [] for name in names}
    ends = {}
    end = time.monotonic() + LONG
    while len(ends) < len(names):
        assert time.monotonic() < end, (tokens, ends)
        for output in engine.poll(1.0):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                ends[output.request_id] = output.error_message
    return {name: (tokens[name], ends[name]) for name in names}


def hang(monkeypatch, zoo: Path, *chains: str) -> threading.Event:
    """Lets the reading of some adapters not end, as on a network folder that stalls, before the event is
    set."""
    store, go_on, load = Zoo.open(zoo), threading.Event(), Zoo.load_delta
    hung = {d for chain in chains for step in store.chain(chain).steps for d in step.deltas}

    def stalled(self, id, *args, **kwargs):
        if id in hung:
            assert go_on.wait(LONG)
        return load(self, id, *args, **kwargs)

    monkeypatch.setattr(Zoo, "load_delta", stalled)
    return go_on


def test_a_message_that_fails_fails_alone(running, monkeypatch):
    engine, _ = running(["base"])
    submit = engine._loop.submit

    def clumsy(request):
        if request.request_id == "bad":
            raise KeyError("a bug")
        submit(request)

    monkeypatch.setattr(engine._loop, "submit", clumsy)
    monkeypatch.setattr(engine._loop, "cancel", lambda request_id: 1 / 0)
    engine.cancel("x")
    ask(engine, "base", "bad")
    ask(engine, "base", "good")
    found = answers(engine, ["bad", "good"])
    assert "KeyError" in found["bad"][1] and len(found["good"][0]) == 4


def test_a_placement_that_fails_fails_its_load(running, monkeypatch):
    engine, _ = running(["base", "a", "b"])

    place = engine._loads._place_adapter

    def only_b(adapter, needs, writes):
        if adapter is engine._loop.graph.routes["a"].needs.adapter:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        place(adapter, needs, writes)

    monkeypatch.setattr(engine._loads, "_place_adapter", only_b)
    ask(engine, "a", "a")
    ask(engine, "b", "b")
    found = answers(engine, ["a", "b"])
    assert "RESOURCE_EXHAUSTED" in found["a"][1] and len(found["b"][0]) == 4
    assert engine.stats().load_failures == 1


def no_memory(*args) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes")


def test_a_step_without_memory_starts_its_sequences_over(running, monkeypatch):
    engine, _ = running(["base"])
    names = ["x", "y", "z"]
    for name in names:
        ask(engine, "base", name, 30)
    quiet = answers(engine, names)
    run, fail = engine._device.run, [40, 41, 90]  # calls of a block

    def scarce(*args):
        fail[:] = [n - 1 for n in fail]
        if 0 in fail and len(engine._loop._sequences.running) > 1:
            no_memory()
        return run(*args)

    monkeypatch.setattr(engine._device, "run", scarce)
    for name in names:
        ask(engine, "base", name, 30)
    assert answers(engine, names) == quiet
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.pages_free == stats.pages_total


def test_a_request_that_has_no_memory_alone_fails_alone(running, monkeypatch):
    engine, _ = running(["base"])
    run = engine._device.run

    def scarce(instance, batch, *rest):
        if any(item.sequence.request.request_id == "huge" for item in batch.items):
            no_memory()
        return run(instance, batch, *rest)

    monkeypatch.setattr(engine._device, "run", scarce)
    for name in ("x", "huge", "y"):
        ask(engine, "base", name, 20)
    found = answers(engine, ["x", "huge", "y"])
    assert "no memory for a step of this request alone" in found["huge"][1]
    assert len(found["x"][0]) == len(found["y"][0]) == 20


def test_a_load_whose_layers_adapt_different_projections_returns(running):
    engine, _ = running(["base", "a"])
    done = threading.Event()
    names = []

    def load():
        names.extend(m.name for m in engine.serve(["base", "a", "uneven"]))
        done.set()

    threading.Thread(target=load, daemon=True).start()
    assert done.wait(LONG)
    assert names == ["a", "base", "uneven"]
    ask(engine, "uneven")
    assert len(answers(engine, ["r"])["r"][0]) == 4


def test_an_unload_needs_no_zoo_and_a_load_says_that_it_is_away(running):
    engine, folder = running(["base", "a", "b"])
    ask(engine, "a")
    answers(engine, ["r"])
    folder.rename(folder.parent / "away")
    assert [m.name for m in engine.serve(["base@1", "a@1"])] == ["a", "base"]
    with pytest.raises(ValueError, match="is not there"):
        engine.serve(["base@1", "a@1", "c"])
    ask(engine, "a", "again")
    assert len(answers(engine, ["again"])["again"][0]) == 4


def test_a_hung_adapter_is_reported_and_holds_nobody_up(running, monkeypatch):
    engine, folder = running(["base", "a", "b"], read_seconds=5.0)
    go_on = hang(monkeypatch, folder, "a", "c")
    began = time.monotonic()
    ask(engine, "a", "hung")
    ask(engine, "b", "cold")
    ask(engine, "base", "warm")
    found = answers(engine, ["hung", "cold", "warm"])
    assert len(found["cold"][0]) == len(found["warm"][0]) == 4
    assert "did not end within 5 seconds" in found["hung"][1]
    assert time.monotonic() - began > 4.0
    assert engine.stats().hung_reads >= 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        load = pool.submit(engine.serve, ["base@1", "a@1", "b@1", "c"])
        assert [m.name for m in engine.serve(["base@1", "b@1"])] == ["b", "base"]  # while it hangs
        assert not load.done()
        with pytest.raises(ValueError, match="c cannot be read"):
            load.result(LONG)
    go_on.set()


def test_real_streams_go_on_after_a_kill(stored):
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
    settings["prefill_grids"] = [[1, 16]]
    kwargs = {"zoo": str(stored), **settings}
    engine = SupervisedEngine(
        lambda served: ProcessEngine(
            "jblock.engine.factory:build_engine",
            {**kwargs, "models": list(served) or ["base", "a"]},
            heartbeat_seconds=30.0,
        )
    )
    try:
        engine.models()

        def start(suffix: str) -> list[str]:
            for name, options in (("g", {}), ("s", {"temperature": 0.9, "seed": 3})):
                for model in ("base", "a"):
                    ask(engine, model, name + model + suffix, 120, **options)
            return [n + m + suffix for n in "gs" for m in ("base", "a")]

        quiet = answers(engine, start("1"))
        names = start("2")
        tokens = {name: [] for name in names}
        killed = False
        ended = set()
        end = time.monotonic() + LONG
        while len(ended) < 4:
            assert time.monotonic() < end
            for output in engine.poll(0.1):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == "length", output
                    ended.add(output.request_id)
            if not killed and all(tokens.values()):
                os.kill(engine.pid, signal.SIGKILL)
                killed = True
        assert killed
        while engine.stats().restarts != 1:  # its outputs may all have come before it died
            assert time.monotonic() < end
            engine.poll(0.1)
        assert [tokens[n] for n in names] == [quiet[n[:-1] + "1"][0] for n in names]
        assert [(m.name, m.version) for m in engine.models()] == [("a", 1), ("base", 1)]
    finally:
        engine.close()
