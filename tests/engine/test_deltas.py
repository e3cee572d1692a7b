"""Every kind of delta against the library that wrote it: logits within 1e-4, 64 greedy tokens identical, all
deltas of a base in the same batches; and each bit-identical to itself alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from harness import FIXTURES, Agent, request
from test_parity import TOLERANCE
from test_sharing import transcript

from checkpoints import hf, peft
from checkpoints.adapters.adapter import base_named_by
from checkpoints.errors import CheckpointError
from checkpoints.merge import merge
from checkpoints.progress import Progress
from jblock.engine.config import EngineConfig

# One grid for decoding and one for prefill: one execution plan, whatever the batch.
ONE_PLAN = EngineConfig(
    max_num_seqs=8,
    max_model_len=192,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((8, 16),),
    kv_memory_mb=4,
    adapter_slots=8,
)
QUIET = Progress(False)
NAMES = sorted(p.name for p in (FIXTURES / "deltas").iterdir())
BITFIT = {"neox_bitfit": "gpt_neox", "qwen2_bitfit": "qwen2_bias"}


def base_of(name: str) -> str:
    """Name of the checkpoint a delta was made on."""
    if name in BITFIT:
        return BITFIT[name]
    config = json.loads((FIXTURES / "deltas" / name / "adapter_config.json").read_text())
    return base_named_by(config)


def oracle(name: str) -> dict[str, np.ndarray]:
    """What the library that wrote it computed."""
    with np.load(FIXTURES / "deltas" / name / "oracle.npz") as arrays:
        return dict(arrays)


def write_bitfit(name: str, folder: Path) -> Path:
    """The whole checkpoint of a fine-tune of which the fixture has the changed tensors; returns it."""
    base = FIXTURES / "hf" / BITFIT[name]
    changed = safetensors.numpy.load_file(FIXTURES / "deltas" / name / "vectors.safetensors")
    folder.mkdir()
    tensors = safetensors.numpy.load_file(base / "model.safetensors") | changed
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_bytes((base / file).read_bytes())
    return folder


# Most methods of adapting are on the first; the other has layers of two kinds.
QUICK = ("llama_gqa_untied", "gemma3")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """All deltas and their bases."""
    path = tmp_path_factory.mktemp("deltas") / "zoo"
    for base in sorted(set(map(base_of, NAMES))):
        hf.convert(FIXTURES / "hf" / base, path, base, QUIET)
    for name in NAMES:
        if name in BITFIT:
            hf.convert(write_bitfit(name, path.parent / name), path, name, QUIET)
        else:
            peft.convert(FIXTURES / "deltas" / name, path, base_of(name), name, QUIET)
    return path


@pytest.mark.parametrize(
    "base",
    [
        base if base in QUICK else pytest.param(base, marks=pytest.mark.long)
        for base in sorted(set(map(base_of, NAMES)))
    ],
)
def test_matches_peft_in_one_batch_and_alone(zoo, base):
    models = [n for n in NAMES if base_of(n) == base]
    agent = Agent.make(zoo, [base, *models], ONE_PLAN)
    for model in set(models) & set(BITFIT):  # served by the base's own blocks
        assert agent.graph.routes[model].instances == agent.graph.routes[base].instances
    expected = {m: oracle(m) for m in models}
    prompts = {f"{m} long": (m, expected[m]["prompt"]) for m in models}
    prompts |= {f"{m} short": (m, expected[m]["prompt_short"]) for m in models}
    prompts["mate"] = (base, expected[models[0]]["prompt"][:37])
    for request_id, (model, prompt) in prompts.items():
        agent.loop.submit(request(request_id, model, prompt, logprobs=True))
    together = agent.run()

    for model in models:
        o = expected[model]
        for kind, greedy in (("long", o["greedy"]), ("short", o["greedy_short"])):
            tokens = [t for out in together[f"{model} {kind}"] for t in out.token_ids]
            assert tokens == greedy.tolist(), f"{model} {kind}"
        first = len(o["prompt"]) + agent.graph.routes[model].virtual_tokens - 1
        wanted = dict(enumerate([o["logits"][-1], *o["greedy_logits"][1:]], first))
        compare(agent, f"{model} long", wanted, 64)
    # Every position of the prompts as the last of one that is computed in chunks.
    agent.device.seen.clear()
    lengths = (1, 2, 15, 16, 17, 33)
    shorter = {f"{m} {n}": (m, expected[m]["prompt"][:n]) for m in models for n in lengths}
    agent.generate(shorter, max_tokens=1)
    for model in models:
        virtual = agent.graph.routes[model].virtual_tokens
        for n in lengths:
            last = {virtual + n - 1: expected[model]["logits"][n - 1]}
            compare(agent, f"{model} {n}", last, 1)
    # What is served alone is bit by bit what it was among all the others.
    for request_id, (model, prompt) in prompts.items():
        agent.loop.submit(request("alone", model, prompt, logprobs=True))
        alone = transcript(agent.run()["alone"])
        assert alone == transcript(together[request_id]), request_id


def compare(agent: Agent, request_id: str, wanted: dict[int, np.ndarray], count: int) -> None:
    """Holds the logits seen for a request against {position: logits}."""
    found = 0
    for batch, logits in agent.device.seen:
        for i, item in enumerate(batch.items):
            position = item.start + item.q_len - 1
            if item.sequence.request.request_id == request_id and position in wanted:
                np.testing.assert_allclose(
                    logits[i], wanted[position], atol=TOLERANCE, rtol=0, err_msg=request_id
                )
                found += 1
    assert found == count


def test_several_adapters_on_one_model(zoo):
    """Weighted sums and an adapter on an adapter, against peft's merged weights, in one batch."""
    for name in ("lora_qv_r4", "lora_rslora_r16", "lora_all_r8"):
        peft.convert(FIXTURES / "peft" / name, zoo, "llama_gqa_untied", name, QUIET)
    halves = [("lora_qv_r4", 0.7), ("lora_rslora_r16", 0.6)]
    merge(zoo, "merged_cat", halves, "cat", QUIET)
    merge(zoo, "merged_linear", [("lora_qv_r4", 0.7), ("lora_embed_head", 0.5)], "linear", QUIET)
    stacked = zoo.parent / "stacked"
    shutil.copytree(FIXTURES / "deltas" / "dora_embed", stacked)
    config = json.loads((stacked / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "lora_all_r8"
    (stacked / "adapter_config.json").write_text(json.dumps(config))
    peft.convert(stacked, zoo, "lora_all_r8", "dora_on_lora", QUIET)

    models = ["merged_cat", "merged_linear", "dora_on_lora"]
    agent = Agent.make(zoo, ["llama_gqa_untied", *models], ONE_PLAN)
    expected = {}
    for m in models:
        with np.load(FIXTURES / "several" / m / "oracle.npz") as arrays:
            expected[m] = dict(arrays)
    tokens = agent.generate({m: (m, expected[m]["prompt"]) for m in models})
    for m in models:
        o = expected[m]
        assert tokens[m] == o["greedy"].tolist()
        rows = [o["logits"][-1], *o["greedy_logits"][1:]]
        compare(agent, m, dict(enumerate(rows, len(o["prompt"]) - 1)), 64)
    with pytest.raises(CheckpointError, match="one base"):
        merge(zoo, "bad", [("lora_qv_r4", 1.0), ("qwen2_ia3", 1.0)], "cat", QUIET)
    with pytest.raises(CheckpointError, match="ranks"):
        merge(zoo, "bad", halves, "linear", QUIET)
    with pytest.raises(CheckpointError, match="bottleneck"):
        merge(zoo, "bad", [("lora_qv_r4", 1.0), ("bn_houlsby", 1.0)], "cat", QUIET)
    with pytest.raises(CheckpointError, match="use_dora"):
        merge(zoo, "bad", [("lora_qv_r4", 1.0), ("dora_embed", 1.0)], "cat", QUIET)


@pytest.mark.parametrize("model", ["llama_prompt", "llama_prefix"])
def test_virtual_tokens_are_shared_and_not_told_of(zoo, model):
    agent = Agent.make(zoo, [model], ONE_PLAN)
    o = oracle(model)
    agent.loop.submit(request("scored", model, o["prompt"], prompt_logprobs=True, max_tokens=1))
    scores = [out.prompt_logprobs for out in agent.run()["scored"] if out.prompt_logprobs]
    shifted = o["logits"] - o["logits"].max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = [row[t] for row, t in zip(logprobs, o["prompt"][1:], strict=False)]
    np.testing.assert_allclose(scores[0], expected, atol=TOLERANCE)
    before = agent.loop.stats().cached_tokens
    # Another prompt finds the pages that hold virtual tokens alone.
    agent.generate({"other": (model, o["prompt"][1:9])}, max_tokens=1)
    virtual = agent.graph.routes[model].virtual_tokens
    assert agent.loop.stats().cached_tokens - before == virtual // 16 * 16
    assert agent.device.max_model_len(agent.graph.routes[model]) == 192 - virtual
