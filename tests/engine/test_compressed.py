"""Compressed fine-tunes in the engine: the logits of the weights they stand for; rows of the base, of
LoRA tenants and of compressed ones in the same calls, none of which sees the others."""

import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from harness import FIXTURES, Agent, oracle, request

from bench.models import ModelShape
from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.adapt import forward
from jblock.adapt.compression import compress_chain
from jblock.blocks import layout
from jblock.engine.adapters import compose
from jblock.engine.adapters.slot_layout import table_bytes
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.signature import TableForm
from jblock.zoo.store import Zoo

TOLERANCE = 1e-4
QUIET = Progress(False, quiet=True)
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_model_len=64,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((4, 16),),
    kv_memory_mb=4,
    adapter_slots=6,
)
TWO_SLOTS = dataclasses.replace(CONFIG, adapter_slots=2)
SETTINGS = {
    "low": ({"codecs": ("low_rank",), "budget": 0.6}, "low_rank"),
    "bits": ({"codecs": ("bits",), "budget": 0.2}, "bits"),
    "mixed": ({"budget": 0.45}, None),
}


def tuned(folder, source, change: float):
    """A checkpoint like `source` with every tensor of layers 1 and 2 changed, norms too."""
    shutil.copytree(source, folder)
    rng = np.random.default_rng(7)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "layers.1." in name or "layers.2." in name:
            noise = rng.standard_normal(value.shape).astype(np.float32)
            tensors[name] = value + np.float32(change) * noise
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A base with two adapters, and a fine-tune of it in three compressed forms."""
    root = tmp_path_factory.mktemp("compressed")
    base = FIXTURES / "hf" / "llama_gqa_untied"
    hf.convert(base, root / "zoo", "llama_gqa_untied", QUIET)
    for name in ("lora_all_r8", "lora_qv_r4"):
        peft.convert(FIXTURES / "peft" / name, root / "zoo", "llama_gqa_untied", name, QUIET)
    hf.convert(tuned(root / "tuned", base, 0.05), root / "zoo", "tuned", QUIET)
    store = Zoo.open(root / "zoo")
    for name, (options, _) in SETTINGS.items():
        compress_chain(
            store, store.chain("tuned"), store.chain("llama_gqa_untied"), name=name, **options
        )
    return root / "zoo"


@pytest.fixture(scope="module")
def agent(zoo):
    """All of them on one agent, on one grid to decode and one to prefill."""
    return Agent.make(zoo, ["llama_gqa_untied", "lora_all_r8", "lora_qv_r4", *SETTINGS], CONFIG)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_stored(zoo, name):
    store = Zoo.open(zoo)
    base, own, made = (store.chain(n) for n in ("llama_gqa_untied", "tuned", name))
    assert made.policy == "near" and made.derived["chain"] == "tuned@1"
    assert made.derived["bytes_after"] <= SETTINGS[name][0]["budget"] * made.derived["bytes_before"]
    kinds = set()
    for b, o, m in zip(base.steps, own.steps, made.steps, strict=True):
        if b.component == o.component:
            assert m == b
        elif m.deltas:
            assert m.component == b.component
            specs = [store.delta(d).spec for d in m.deltas]
            assert specs[0].kind == "vectors"  # norms changed, and are kept exactly
            kinds |= {s.kind for s in specs[1:]}
    assert kinds == {SETTINGS[name][1]} if SETTINGS[name][1] else kinds


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_weights_it_stands_for(zoo, agent, name):
    store = Zoo.open(zoo)
    weights = forward.load(store, store.chain(name).steps)
    agent.device.seen.clear()
    prompt = oracle("llama_gqa_untied")["prompt"][:37]
    tokens = agent.generate({name: (name, prompt)}, max_tokens=6)[name]
    whole = np.concatenate([prompt, tokens])[None, :-1]
    _, expected = forward.outputs(weights, whole)
    compared = 0
    for batch, logits in agent.device.seen:
        for row, item in zip(logits, batch.items, strict=False):
            if item.samples:
                at = item.start + item.q_len - 1
                np.testing.assert_allclose(row, expected[0, at], atol=TOLERANCE, rtol=0)
                compared += 1
    assert compared == 6
    plain = forward.load(store, store.chain("llama_gqa_untied").steps)
    base = np.asarray(forward.outputs(plain, whole)[1])
    assert np.abs(base - np.asarray(expected)).max() > 100 * TOLERANCE


def test_a_row_is_bit_for_bit_the_same_whatever_else_is_in_the_batch(agent):
    models = list(agent.graph.routes)
    prompts = {m: oracle("llama_gqa_untied")["prompt"][: 20 + 3 * i] for i, m in enumerate(models)}

    def run(names):
        for i, m in enumerate(names):
            agent.loop.submit(
                request(
                    f"{m}/{i}", m, prompts[m], max_tokens=8, logprobs=True, temperature=0.7, seed=3
                )
            )
        found = agent.run()
        return {
            i: [pair for o in out for pair in zip(o.token_ids, o.logprobs, strict=True)]
            for i, out in found.items()
        }

    alone = {m: run([m])[f"{m}/0"] for m in models}
    before = agent.loop.stats()
    for order in (
        models,
        models[::-1],
        ["bits", "bits", "mixed", "llama_gqa_untied", "bits", "low"],
    ):
        for request_id, pairs in run(order).items():
            assert pairs == alone[request_id.partition("/")[0]], request_id
    after = agent.loop.stats()
    # They met: rows of all tenants in the calls of the base's blocks.
    calls = after.block_calls - before.block_calls
    assert (after.block_rows - before.block_rows) / calls > 3
    assert len({id(i) for r in agent.graph.routes.values() for i in r.instances}) < 2 * len(
        agent.graph.routes["llama_gqa_untied"].instances
    )


def test_a_slot_that_changes_hands_keeps_nothing(zoo):
    """Two slots for five tenants, so that tables are written over while others run."""
    agent = Agent.make(zoo, ["llama_gqa_untied", "lora_qv_r4", *SETTINGS], TWO_SLOTS)
    prompt = oracle("llama_gqa_untied")["prompt"][:9]
    alone = {m: agent.generate({m: (m, prompt)}, max_tokens=5)[m] for m in agent.graph.routes}
    for _ in range(2):
        together = agent.generate({m: (m, prompt) for m in agent.graph.routes}, max_tokens=5)
        assert together == alone
    assert agent.loop.stats().evictions > 2


def places_of(graph) -> set[int]:
    """Entries of the tables of few bits, entry 0 not counted."""
    arrays = [a for i in graph.instances for u in i.layers for t in u.tables for a in t.items()]
    return {len(array) - 1 for name, array in arrays if name.endswith(".codes")}


def few_bits_bytes() -> int:
    """Bytes of all codes on the device."""
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays() if a.dtype == np.uint8 and a.ndim == 3)


def test_tables_of_few_bits_have_places_for_what_is_served(zoo):
    store, before = Zoo.open(zoo), few_bits_bytes()

    def serve(names, previous=None):
        chains = {n: store.chain(n) for n in ("llama_gqa_untied", *names)}
        graph = assemble(store, chains, CONFIG, previous)
        graph.make_tables()
        return graph

    one = serve(["lora_qv_r4", "bits"])
    assert places_of(one) == {1} and one.routes["bits"].adapter.places == 1
    assert one.routes["lora_qv_r4"].adapter.places == 0
    two = serve(["lora_qv_r4", "bits", "mixed"], one)
    assert places_of(two) == {2} and places_of(one) == {1}  # while requests still run on it
    assert two.routes["lora_qv_r4"].adapter is one.routes["lora_qv_r4"].adapter
    none = serve(["lora_qv_r4"], two)
    assert places_of(none) == set()
    assert none.table_bytes < one.table_bytes < two.table_bytes
    # Nothing but compressed ones: rank blocks too are as many as they take.
    alone = serve(["low", "bits"])
    deltas = [[store.delta(d).spec for d in s.deltas] for s in store.chain("low").steps]
    size = max(map(compose.num_pieces, deltas))
    (pieces,) = {form.pieces - 1 for _, form in alone.resident_set.tables}
    assert size <= pieces == max(1 << (size - 1).bit_length(), 2) < CONFIG.adapter_pieces
    assert alone.routes["low"].adapter.table_pieces == pieces
    assert one.routes["bits"].adapter.table_pieces == 0
    del alone
    for graph in (one, two):
        for tables, form in graph.resident_set.tables.keys() - none.resident_set.tables.keys():
            tables.drop(form)
        del graph
    del one, two, tables
    assert few_bits_bytes() == before


def test_what_two_compressed_models_take():
    """MB of tables for the last six of SmolLM2-135M's 30 layers, with the default slots: docs/memory.md."""
    shape = ModelShape(
        layers=6,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
    )
    config = EngineConfig()

    def megabytes(places, pieces=config.adapter_pieces):
        total = 0
        for spec in (shape.attention, shape.ffn):
            names = layout.computed_widths(spec)
            targets = sorted(f"{name}{end}" for name in names for end in ("", ".bits2", ".bits4"))
            form = TableForm(
                targets=tuple(targets),
                slots=config.adapter_slots + 1,
                pieces=pieces + 1,
                places=places + 1,
            )
            total += shape.layers * table_bytes(spec, form)
        return round(total / 1e6)

    # None, two, and as many as there are slots; two of rank 32 that no adapter is served beside.
    assert [megabytes(places) for places in (0, 2, 32)] == [146, 183, 740]
    assert megabytes(2, pieces=8) == 73


def test_compressed_models_come_and_go_while_others_run(zoo):
    """Tables grow and shrink with what is served, and others' slots are few: nobody's tokens change, what
    was begun ends on the tables it began with, and the bytes come back."""
    store, prompt = Zoo.open(zoo), oracle("llama_gqa_untied")["prompt"][:9]
    few = ["llama_gqa_untied", "low", "bits"]
    every = [*few, "lora_qv_r4", "mixed"]
    agent = Agent.make(zoo, few, TWO_SLOTS)
    start = few_bits_bytes()

    def serve(names):
        chains = {n: store.chain(n) for n in names}
        graph = assemble(store, chains, TWO_SLOTS, agent.graph)
        graph.make_tables()
        agent.graph = graph
        agent.loop.switch(graph)

    def ask(names, at):
        for name in names:
            agent.loop.submit(request(f"{name}/{at}", name, prompt, max_tokens=8))

    outputs = []
    for at, names in enumerate((few, every, few)):
        if at:
            serve(names)
        ask(names, at)
        assert places_of(agent.graph) == {2 if "mixed" in names else 1}
        for _ in range(4):  # Not to the end: what is served changes in the middle.
            outputs += agent.loop.step()
    assert few_bits_bytes() > start  # Some still run on the tables of two.
    outputs += [o for own in agent.run().values() for o in own]
    found = {}
    for output in outputs:
        assert not output.error_message, output
        found.setdefault(output.request_id, []).extend(output.token_ids)
    assert len(found) == 2 * len(few) + len(every)
    for request_id, tokens in found.items():
        name = request_id.partition("/")[0]
        assert tokens == found[f"{name}/{0 if name in few else 1}"] and len(tokens) == 8
    assert len(set(map(tuple, found.values()))) > 2
    assert few_bits_bytes() == start


def test_the_record_is_plain_json(zoo):
    derived = Zoo.open(zoo).chain("mixed").derived
    assert json.loads(json.dumps(derived)) == derived
    assert sum(derived["codecs"].values()) == 4 and 0 < derived["change_error"] < 0.9
