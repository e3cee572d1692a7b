"""Families side by side in one agent, and fine-tunes that change experts only."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from harness import FIXTURES, Agent, oracle

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.config import EngineConfig
from jblock.zoo.store import Zoo

CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=192,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=16,
)


def test_families_share_a_process(zoo):
    """Other hidden sizes, KV shapes, windows, norms and positions in the same steps."""
    names = ["gemma2", "mixtral", "qwen3_qknorm", "llama_gqa_untied"]
    agent = Agent.make(zoo, names, CONFIG)
    tokens = agent.generate({n: (n, oracle(n)["prompt"]) for n in names})
    assert tokens == {n: oracle(n)["greedy"].tolist() for n in names}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A zoo with mixtral, and with a fine-tune of it in which one expert of layer 1 is another."""
    root = tmp_path_factory.mktemp("tuned")
    source = root / "source"
    shutil.copytree(FIXTURES / "hf" / "mixtral", source)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if "layers.1.block_sparse_moe.experts.2" in name:
            tensors[name] = value + np.float32(0.2) * value[::-1]
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for name, path in (("base", FIXTURES / "hf" / "mixtral"), ("tune", source)):
        hf.convert(path, root / "zoo", name, Progress(False))
    return root / "zoo"


def test_an_expert_tune_stores_that_expert(tuned):
    zoo = Zoo.open(tuned)
    base, tune = (zoo.chain(n).steps for n in ("base", "tune"))
    changed = [(b, t) for b, t in zip(base, tune, strict=True) if b != t]
    assert len(changed) == 1
    assert zoo.component(changed[0][1].component).spec.kind == "expert"
    folders = list((tuned / "components").iterdir())
    assert len(folders) == len({s.component for s in base}) + 1


def test_an_expert_tune_shares_the_rest_in_memory(tuned):
    base, both = (Agent.make(tuned, names, CONFIG) for names in (["base"], ["base", "tune"]))
    expert = (
        4
        * 3
        * 32
        * json.loads((FIXTURES / "hf/mixtral/config.json").read_text())["intermediate_size"]
    )
    assert both.loop.stats().resident_bytes == base.loop.stats().resident_bytes + expert
    for name in ("base", "tune"):  # embedding, layer 0 with layer 1's attention, mixture, head
        assert len(both.graph.routes[name].instances) == 4
        assert sum(both.graph.users[i] > 1 for i in both.graph.routes[name].instances) == 3

    # Bits of a request are those of a run alone, and the tune is not its base.
    prompt = oracle("mixtral")["prompt"]

    def logits(agent, requests):
        agent.device.seen.clear()
        agent.generate({m: (m, prompt[:n]) for m, n in requests.items()}, max_tokens=16)
        found = {}
        for batch, rows in agent.device.seen:
            for i, item in enumerate(batch.items):
                found.setdefault(item.sequence.request.request_id, []).append(rows[i])
        return {name: np.stack(rows) for name, rows in found.items()}

    together = logits(both, {"base": 40, "tune": 33})
    for name, length in (("base", 40), ("tune", 33)):
        np.testing.assert_array_equal(together[name], logits(both, {name: length})[name])
    assert not np.array_equal(together["tune"], logits(both, {"base": 33})["base"])
