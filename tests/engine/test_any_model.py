"""Models of any depth, width and KV shape come to a running engine and leave it, while others answer."""

import dataclasses
import threading

import numpy as np
import pytest
from harness import collect_tokens, request, shared_programs

from bench.models import TINY, MemoryZoo
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache

DEEP = dataclasses.replace(TINY, layers=6)
SHALLOW = dataclasses.replace(TINY, layers=2, hidden_size=32, num_heads=2, num_kv_heads=1)
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=64,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=4,
    host_kv_memory_mb=0,
)
PROMPT = tuple(range(1, 40))


def make_zoo() -> MemoryZoo:
    """Three depths, two hidden sizes, two KV shapes; a model that passes a layer twice, and fine-tunes
    whose ffns alone, or attentions alone, are their own."""
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    zoo.add_base("deep", DEEP)
    zoo.add_base("shallow", SHALLOW)
    zoo.add_stack("twice", "deep", [0, 1, 2, 1, 2, 3])
    for kind in ("ffn", "attention"):
        steps = list(zoo.served["deep"].steps)
        for i, step in enumerate(steps):
            spec = zoo.component(step.component).spec
            if spec.kind == kind:
                own = zoo._component(spec, f"deep-{kind}/{i}")
                steps[i] = dataclasses.replace(step, component=own)
        zoo._publish(f"deep-{kind}", tuple(steps))
    return zoo


NAMES = ("base", "deep", "shallow", "twice", "deep-ffn", "deep-attention")


@pytest.fixture(scope="module")
def zoo() -> MemoryZoo:
    return make_zoo()


@pytest.fixture(scope="module")
def cache() -> ExecutableCache:
    return shared_programs()


def serve(zoo: MemoryZoo, cache: ExecutableCache, *names: str) -> ThreadEngine:
    return ThreadEngine(zoo, {n: zoo.chain(n) for n in names}, CONFIG, cache)


@pytest.fixture(scope="module")
def alone(zoo, cache) -> dict[str, list[int]]:
    """What each model answers where it is served alone."""
    answers = {}
    for name in NAMES:
        engine = serve(zoo, cache, name)
        engine.submit(request("r", name, PROMPT, max_tokens=12))
        answers[name] = collect_tokens(engine, ["r"])["r"]
        engine.close()
    return answers


def test_models_of_several_shapes_answer_together_as_alone(zoo, cache, alone):
    engine = serve(zoo, cache, *NAMES)
    for name in NAMES:
        engine.submit(request(name, name, PROMPT, max_tokens=12))
    assert collect_tokens(engine, NAMES) == alone
    engine.close()


@pytest.mark.parametrize("turns", [12, pytest.param(100, marks=pytest.mark.long)])
def test_any_model_comes_and_goes_under_load(zoo, cache, alone, turns):
    engine = serve(zoo, cache, "base")
    engine.wait_until_warm()
    start = engine.stats()
    stop, failures = threading.Event(), []

    def change() -> None:
        rng = np.random.default_rng(0)
        try:
            for turn in range(turns):
                others = rng.permutation(NAMES[1:])[: 1 + turn % 4]
                engine.serve(["base", *others])
                for name in others:
                    open_ids.add(f"{turn}/{name}")
                    engine.submit(request(f"{turn}/{name}", str(name), PROMPT, max_tokens=12))
                if turn % 3 == 0:
                    engine.serve(["base"])  # those that were just asked for still run
            engine.serve(["base"])
        except Exception as e:
            failures.append(e)
        stop.set()

    tokens: dict[str, list[int]] = {}
    open_ids, count = set(), 0
    thread = threading.Thread(target=change)
    thread.start()
    while not stop.is_set() or open_ids:
        if not stop.is_set() and sum(i.startswith("steady") for i in open_ids.copy()) < 2:
            count += 1
            open_ids.add(f"steady{count}")
            engine.submit(request(f"steady{count}", "base", PROMPT, max_tokens=12))
        for output in engine.poll(0.2):
            assert not output.error_message, output
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                open_ids.discard(output.request_id)
    thread.join()
    assert not failures
    for request_id, got in tokens.items():
        name = "base" if request_id.startswith("steady") else request_id.split("/")[1]
        assert got == alone[name], request_id
    engine.wait_until_warm()
    end = engine.stats()
    assert end.compiles_on_serving_path == 0
    same = ("pages_total", "rows_total", "resident_bytes", "chains")
    assert [getattr(end, f) for f in same] == [getattr(start, f) for f in same]
    assert end.pages_free == end.pages_total and end.rows_free == end.rows_total
    engine.close()


def test_a_model_that_would_cut_others_short_is_refused(zoo, cache):
    tight = dataclasses.replace(CONFIG, kv_memory_mb=0, kv_pages=2**31 - 1)
    pages = 4 * TINY.layers * 2 * TINY.num_kv_heads * 16 * TINY.head_dim * 4  # one long sequence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jblock.engine.kv_cache.free_memory.kv_budget", lambda devices: pages)
        patch.setattr("jblock.engine.runner.runner.Runner._workspace", lambda *_: 0)
        engine = ThreadEngine(zoo, {"base": zoo.chain("base")}, tight, cache)
        before = engine.stats().pages_total
        with pytest.raises(ValueError, match="more kv_memory_mb"):
            engine.serve(["base", "deep"])
        assert [m.name for m in engine.models()] == ["base"]
        assert engine.stats().pages_total == before
        engine.submit(request("r", "base", PROMPT, max_tokens=4))
        collect_tokens(engine, ["r"])
        engine.close()
