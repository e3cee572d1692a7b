"""A captured trace names steps, phases, blocks, whose rows they run, and programs; no trace costs nothing."""

import contextlib
import time

import jax
import numpy as np
import pytest
from harness import Agent, oracle, request

from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.runner import tracing
from jblock.engine.runner.batch import Batch
from jblock.tools import trace_summary

BASE, ADAPTER = "qwen3_qknorm", "qwen3_lora_all_r8"
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=96,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((1, 16), (4, 16)),
    kv_memory_mb=1,
    adapter_slots=2,
)


@pytest.fixture(scope="module")
def agent(zoo) -> Agent:
    """A base and its adapter, with all programs they need."""
    agent = Agent.make(zoo, [BASE, ADAPTER], CONFIG)
    run(agent)
    return agent


def run(agent: Agent) -> None:
    """Three requests of two models and two tenants."""
    prompt = oracle(BASE)["prompt"][:20]
    for i, (model, salt) in enumerate(((BASE, "alice"), (BASE, ""), (ADAPTER, "alice"))):
        one = request(f"r{i}", model, np.roll(prompt, i), max_tokens=8)
        agent.loop.submit(type(one)(**{**vars(one), "cache_salt": salt}))
    agent.run()


@pytest.fixture(scope="module")
def lines(agent, tmp_path_factory) -> dict[str, dict[str, trace_summary.Line]]:
    """What a trace of it adds up to: kind -> name -> line."""
    folder = tmp_path_factory.mktemp("trace")
    with jax.profiler.trace(str(folder)):
        run(agent)
    found: dict[str, dict[str, trace_summary.Line]] = {}
    for line in trace_summary.summarize(folder.rglob("*.xplane.pb")):
        found.setdefault(line.kind, {})[line.name] = line
    return found


def test_every_phase_of_every_step(lines):
    # Nothing had to be loaded in these steps.
    assert set(lines["phase"]) | {"load"} == set(tracing.PHASES)
    steps = lines["phase"][tracing.STEP].count
    assert steps >= 8 and lines["phase"]["schedule"].count >= steps
    assert all(line.seconds > 0 for line in lines["phase"].values())


def test_blocks_by_phase_and_who_met_in_them(lines, agent):
    blocks = {i.name for i in agent.graph.instances}
    assert set(lines["block"]) == {f"{b} {p}" for b in blocks for p in ("prefill", "decode")}
    layer = next(b for b in blocks if b.startswith("layer"))
    assert f"{layer}: {BASE}:2 {ADAPTER}:1" in lines["mix"]


def test_programs_by_kind_form_and_grid(lines):
    programs = " ".join(lines["program"])
    for name in ("embedding_d", "layer_d", "_deltas_4x1", "head_d", "greedy_4x1", "4x16"):
        assert name in programs, (name, programs)


def test_a_batch_says_whose_rows_it_has(monkeypatch, agent):
    said = {}

    class Annotation:
        is_enabled = staticmethod(lambda: True)

        def __init__(self, name, **fields):
            said.update(fields, name=name)

    monkeypatch.setattr(tracing, "TraceAnnotation", Annotation)
    monkeypatch.setattr(tracing, "enabled", Annotation.is_enabled)

    class WorkItem:
        def __init__(self, model, salt, q_len):
            self.q_len = q_len
            one = request("r", model, [1])
            self.sequence = type("S", (), {})()
            self.sequence.request = type(one)(**{**vars(one), "cache_salt": salt})

    items = (WorkItem(BASE, "secret", 16), WorkItem(BASE, "secret", 5), WorkItem(ADAPTER, "", 3))
    tracing.block("layer_1", Batch(Bucket(4, 16), items))
    tenant = tracing._tenant("secret")
    assert said == {
        "name": "layer_1",
        "phase": "prefill",
        "grid": "4x16",
        "rows": 24,
        "models": f"{BASE}:21 {ADAPTER}:3",
        "tenants": f"{tenant}:21 -:3",
    }
    assert tenant not in "secret" and len(tenant) == 6


def test_parts_of_programs_have_scopes(agent):
    table = agent.device.executables._table
    text = {key.name: program.as_text() for key, program in table.items()}
    layer = next(v for k, v in text.items() if k.startswith("layer"))
    for scope in ("/attention/paged_attention/", "/attention/lora/", "/ffn/", "/ffn/lora/"):
        assert scope in layer, scope
    assert any("/zero_pages/" in v for k, v in text.items() if k.startswith("zero_pages"))
    assert any("/write_adapter/" in v for k, v in text.items() if k.startswith("write_pieces"))


def test_nothing_is_described_when_nobody_traces(agent):
    batch = Batch(Bucket(4, 1), ())
    assert tracing.block("layer_1", batch) is tracing.NOTHING
    assert isinstance(tracing.NOTHING, contextlib.nullcontext)
    begin = time.perf_counter()
    for _ in range(10_000):
        with tracing.block("layer_1", batch):
            pass
    # Measured 0.5 us; a step of the smallest model takes a thousand times as long.
    assert (time.perf_counter() - begin) / 10_000 < 20e-6
