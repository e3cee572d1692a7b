"""LoRA and fine-tunes with frozen lower layers on families of today, in one batch with their bases, against
peft and transformers: logits within 1e-4, 64 greedy tokens identical."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from harness import FIXTURES, Agent
from test_deltas import compare
from tuned import TUNED, tuned

from checkpoints import hf, peft
from checkpoints.export import export
from checkpoints.progress import Progress
from jblock.engine.config import EngineConfig
from jblock.zoo.store import Zoo

CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=128,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=2,
)
QUIET = Progress(False)


def write_tuned(name: str, folder: Path) -> Path:
    """The whole checkpoint of a fine-tune of which the fixture has the oracle; returns it."""
    base, layer = TUNED[name]
    source = FIXTURES / "hf" / base
    folder.mkdir()
    tensors = tuned(safetensors.numpy.load_file(source / "model.safetensors"), layer)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    "name", [next(iter(TUNED)), *(pytest.param(n, marks=pytest.mark.long) for n in [*TUNED][1:])]
)
def test_a_lora_and_a_fine_tune_beside_their_base(tmp_path, name):
    base, layer = TUNED[name]
    lora = f"{base}_lora"
    zoo = tmp_path / "zoo"
    hf.convert(FIXTURES / "hf" / base, zoo, base, QUIET)
    peft.convert(FIXTURES / "peft" / lora, zoo, base, lora, QUIET)
    folder = write_tuned(name, tmp_path / "tuned")
    hf.convert(folder, zoo, name, QUIET)

    # Only the layer that was tuned is stored again, and it comes back to the last bit.
    store = Zoo.open(zoo)
    pairs = zip(store.chain(base).steps, store.chain(name).steps, strict=True)
    changed = [i for i, (a, b) in enumerate(pairs) if a != b]
    assert changed == [2 * layer + 1, 2 * layer + 2]
    export(zoo, name, tmp_path / "out", QUIET)
    for file in folder.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()

    wanted = {}
    for model, kind in ((base, "hf"), (lora, "peft"), (name, "several")):
        with np.load(FIXTURES / kind / model / "oracle.npz") as arrays:
            wanted[model] = dict(arrays)
    agent = Agent.make(zoo, [base, lora, name], CONFIG)
    tokens = agent.generate({m: (m, o["prompt"][:48]) for m, o in wanted.items()})
    for model in (lora, name):
        o = wanted[model]
        assert len(o["prompt"]) == 48
        assert tokens[model] == o["greedy"].tolist(), model
        rows = [o["logits"][-1], *o["greedy_logits"][1:]]
        compare(agent, model, dict(enumerate(rows, 47)), 64)
