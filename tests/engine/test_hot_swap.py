"""Serving another set of chains while requests run: nobody notices but those who asked for it."""

import dataclasses
import gc
import shutil

import jax
import pytest
from harness import FIXTURES, Agent, collect_tokens, oracle, request, shared_programs

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.api import Engine, EngineDied, UnknownChain
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.process.client import ProcessEngine
from jblock.zoo.store import Zoo

BASE, ADAPTER, SECOND, BF16 = "llama_gqa_untied", "lora_all_r8", "lora_qv_r4", "llama_bf16"
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=1,
)


@pytest.fixture
def engine(zoo, tmp_path):
    """An engine that serves BASE from a zoo of its own, which tests may add versions to."""
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    store = Zoo.open(folder)
    one = ThreadEngine(store, {BASE: store.chain(BASE)}, CONFIG, shared_programs())
    yield one, folder
    one.close()


def greedy(engine: Engine, model: str, prompt, **options) -> list[int]:
    """Tokens of one request alone."""
    engine.submit(request("r", model, prompt, **options))
    return collect_tokens(engine, ["r"])["r"]


def test_adds_and_drops_chains(engine):
    one, _ = engine
    for names in ([BASE, ADAPTER], [BASE, ADAPTER, SECOND], [SECOND], [BASE]):
        infos = one.serve(names)
        assert [m.name for m in infos] == sorted(names) == [m.name for m in one.models()]
        for name in names:
            expected = oracle(name)
            assert greedy(one, name, expected["prompt"]) == expected["greedy"].tolist(), names
    one.submit(request("r", ADAPTER, [5]))
    (output,) = one.poll(10)
    assert output.error_code == "NOT_FOUND"
    assert one.stats().compiles_on_serving_path == 0


def test_a_request_ends_on_the_version_it_started_with(engine):
    one, folder = engine
    prompt = oracle(BASE)["prompt"]
    # A new version of the name BASE: another model of the same shape.
    hf.convert(FIXTURES / "hf" / BF16, folder, BASE, Progress(False, quiet=True))
    one.submit(request("old", BASE, prompt))
    while not (outputs := one.poll(10)):
        pass
    assert outputs[0].token_ids and not outputs[0].finish_reason
    (info,) = one.serve([BASE])
    assert info.version == 2
    one.submit(request("new", BASE, prompt))
    tokens = collect_tokens(one, ["old", "new"], outputs)
    assert tokens["old"] == oracle(BASE)["greedy"].tolist()
    # The same prompt, whose pages are cached for the old version: none of them matched.
    fresh = Agent.make(folder, [BF16], CONFIG)
    assert tokens["new"] == fresh.generate({"r": (BF16, prompt)})["r"] != tokens["old"]
    assert one.stats().compiles_on_serving_path == 0


def test_only_differing_blocks_are_loaded_and_memory_comes_back(engine, monkeypatch):
    one, _ = engine
    prompt = oracle(BASE)["prompt"]
    start = one.stats().resident_bytes

    def live() -> int:
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    greedy(one, BASE, prompt)
    before = live()
    loaded = []
    original = Zoo.load_component
    monkeypatch.setattr(
        Zoo, "load_component", lambda self, id, *a: loaded.append(id) or original(self, id, *a)
    )
    one.serve([BASE, ADAPTER])
    assert loaded == []  # the adapter rides on components that are there
    one.serve([BASE, BF16])
    assert len(loaded) == len(set(loaded)) > 0
    assert one.stats().resident_bytes > start
    one.serve([BASE])
    greedy(one, BASE, prompt)
    assert one.stats().resident_bytes == start
    assert live() <= before


def test_a_version_can_be_pinned(engine):
    one, folder = engine
    hf.convert(FIXTURES / "hf" / BF16, folder, BASE, Progress(False, quiet=True))
    for names, version in (([BASE], 2), ([f"{BASE}@1"], 1)):
        (info,) = one.serve(names)
        assert (info.name, info.version) == (BASE, version)
    one.submit(dataclasses.replace(request("r", BASE, [5]), version=2))
    (output,) = one.poll(10)
    assert (output.error_code, "version 1 by now, not 2" in output.error_message) == (
        "ABORTED",
        True,
    )
    with pytest.raises(UnknownChain, match=f"'{BASE}@3' is not in the zoo, which has .*{ADAPTER}"):
        one.serve([f"{BASE}@3"])


def test_in_a_process_of_its_own(zoo):
    settings = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    kwargs = {"zoo": str(zoo), "models": [BASE], **settings}
    engine = ProcessEngine("jblock.engine.factory:build_engine", kwargs)
    assert [m.name for m in engine.models()] == [BASE]
    assert [m.name for m in engine.serve([BASE, ADAPTER])] == sorted([BASE, ADAPTER])
    expected = oracle(ADAPTER)
    assert greedy(engine, ADAPTER, expected["prompt"]) == expected["greedy"].tolist()
    # Another hidden size and another KV shape.
    other = "qwen3_qknorm"
    assert [m.name for m in engine.serve([BASE, other])] == sorted([BASE, other])
    assert greedy(engine, other, oracle(other)["prompt"]) == oracle(other)["greedy"].tolist()
    assert engine.stats().compiles_on_serving_path == 0
    engine.close()


def test_who_waits_for_a_closed_engine_hears_of_it(engine):
    one, _ = engine
    one.close()
    with pytest.raises(EngineDied, match="was closed"):
        one.serve([BASE])


def test_a_set_that_cannot_be_served_changes_nothing(engine):
    one, _ = engine
    with pytest.raises(ValueError, match="nobody"):
        one.serve([BASE, "nobody"])
    assert [m.name for m in one.models()] == [BASE]
    assert greedy(one, BASE, oracle(BASE)["prompt"]) == oracle(BASE)["greedy"].tolist()
