"""Quantized chains in the engine: the logits of the float32 weights that the codes stand for, in every
family; and beside their originals in one batch."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from harness import Agent, oracle, request

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.adapt.quantization import quantize_chain
from jblock.blocks import layout, quantize
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import QUANTIZABLE, unquantized
from jblock.engine.config import EngineConfig
from jblock.families import family_for
from jblock.zoo.store import Zoo

TOLERANCE = 1e-4
# A group that no family's sizes divide evenly, so that the greatest common divisor is needed.
SPECS = {4: QuantSpec(bits=4, group=64), 8: QuantSpec(bits=8, group=16)}
FAMILIES = {
    "llama_gqa_untied": 4,
    "mistral_window": 8,
    "qwen2_bias": 4,
    "qwen3_qknorm": 8,
    "mixtral": 4,
    "qwen2_moe": 8,
    "gemma2": 4,
    "phi3": 8,
    "olmo2": 4,
    "gpt2": 4,
    "gpt_neox": 8,
}
# Families without a fixture: random weights.
MADE = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "hidden_act": "gelu"},
        **{"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
    },
}
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=64,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=4,
)


def made(folder, name: str):
    """A checkpoint of a family that has no fixture."""
    rng = np.random.default_rng(0)
    tensors = {}
    for step in family_for(MADE[name]).plan(MADE[name]).steps:
        for tensor, shape in step.spec.tensors().items():
            value = (0.3 * rng.standard_normal(shape)).astype(np.float32)
            tensors.setdefault(step.tensors[tensor], value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MADE[name]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def widened(zoo: Zoo, chain, name: str):
    """The same chain with every quantized weight as the float32 matrix it stands for."""
    steps = []
    for step in chain.steps:
        record = zoo.component(step.component)
        spec = record.spec
        if isinstance(spec, QUANTIZABLE) and spec.quant is not None:
            stored = zoo.load_component(step.component)
            plain = unquantized(spec)
            tensors = {
                n: quantize.dequantize(stored, n.removesuffix(".weight"), spec.quant)
                if layout.is_projection(plain, n)
                else stored[n]
                for n in plain.tensors()
            }
            new = zoo.put_component(plain, tensors)
            deltas = tuple(
                zoo.put_delta(zoo.delta(d).spec, new, zoo.load_delta(d)) for d in step.deltas
            )
            step = dataclasses.replace(step, component=new, deltas=deltas)
        steps.append(step)
    return zoo.publish(
        dataclasses.replace(chain, name=name, version=0, steps=tuple(steps), derived={})
    )


QUICK = ("llama_gqa_untied", "gpt2")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in FAMILIES]
)
def test_logits_are_those_of_the_weights_it_stands_for(zoo, name, tmp_path):
    if name in MADE:
        hf.convert(made(tmp_path / name, name), zoo, name, Progress(False, quiet=True))
    store = Zoo.open(zoo)
    small = quantize_chain(store, store.chain(name), f"{name}-q", SPECS[FAMILIES[name]])
    wide = widened(store, small, f"{name}-w")
    agent = Agent.make(zoo, [name, small.name, wide.name], CONFIG)
    prompt = oracle("llama_gqa_untied" if name in MADE else name)["prompt"][:37] % 96
    agent.generate(
        {"base": (name, prompt), "small": (small.name, prompt), "wide": (wide.name, prompt)},
        max_tokens=6,
    )
    seen: dict[str, list[np.ndarray]] = {}
    for batch, logits in agent.device.seen:
        for i, item in enumerate(batch.items):
            if item.samples:
                seen.setdefault(item.sequence.request.request_id, []).append(logits[i])
    np.testing.assert_allclose(seen["small"], seen["wide"], atol=TOLERANCE, rtol=0)
    assert np.abs(np.subtract(seen["base"][0], seen["wide"][0])).max() > 10 * TOLERANCE


def test_an_adapter_rides_on_quantized_weights(zoo):
    store = Zoo.open(zoo)
    small = quantize_chain(store, store.chain("lora_all_r8"), "lora-q", SPECS[4])
    widened(store, small, "lora-w")
    agent = Agent.make(zoo, ["lora-q", "lora-w"], CONFIG)
    prompt = oracle("lora_all_r8")["prompt"][:20]
    logprobs = {}
    for model in ("lora-q", "lora-w"):
        agent.loop.submit(request(model, model, prompt, max_tokens=8, logprobs=True))
        logprobs[model] = [p for o in agent.run()[model] for p in o.logprobs]
    np.testing.assert_allclose(logprobs["lora-q"], logprobs["lora-w"], atol=TOLERANCE, rtol=0)
