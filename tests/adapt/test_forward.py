"""The offline forward pass against what transformers and peft computed, and its gradients."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoos

from checkpoints import hf, peft
from checkpoints.adapters.adapter import base_named_by
from checkpoints.progress import Progress
from jblock.adapt import forward, merging
from jblock.blocks.delta_spec import Ia3Spec, LoraSpec, LoraTarget
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

# Soft caps, windows and norms behind; experts, and norms of q and k.
MODELS = ["gemma2", "qwen3_moe"]
FIXTURES = Path(__file__).parent.parent / "fixtures"
QUIET = Progress(bars=False, quiet=True)


def oracle(path):
    with np.load(path / "oracle.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", MODELS)
def test_matches_transformers(name, tmp_path):
    chain, _ = hf.convert(FIXTURES / "hf" / name, tmp_path, name, QUIET)
    expected = oracle(FIXTURES / "hf" / name)
    weights = forward.load(Zoo.open(tmp_path), chain.steps)
    hidden, logits = forward.outputs(weights, expected["prompt"][None])
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-4, rtol=0)
    assert hidden.shape[:2] == logits.shape[:2]


MERGED = [
    "dora_embed",  # on attention, ffn and embedding
    "gpt2_dora",  # on projections that are stored transposed
    "gpt2_ia3",
    "gpt2_lora_biases",
    "lora_embed_head",
    "neox_lora_b_bias",
    "phi3_lora_fused",
    "qwen2_ia3",  # beside biases
]


def converted(folder, path):
    """A zoo with an adapter of the fixtures and its base; returns the adapter's chain."""
    base = base_named_by(json.loads((folder / "adapter_config.json").read_text()))
    hf.convert(FIXTURES / "hf" / base, path, base, QUIET)
    return peft.convert(folder, path, base, "a", QUIET)[0]


@pytest.mark.parametrize("folder", ["peft/lora_all_r8", *(f"deltas/{name}" for name in MERGED)])
def test_adapters_are_merged(folder, tmp_path):
    chain = converted(FIXTURES / folder, tmp_path)
    expected = oracle(FIXTURES / folder)
    zoo = Zoo.open(tmp_path)
    assert merging.unmergeable(zoo, chain.steps) is None
    _, logits = forward.outputs(forward.load(zoo, chain.steps), expected["prompt"][None])
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama_prompt", "neox_prefix", "bn_pfeiffer"])
def test_what_cannot_be_merged_is_told(name, tmp_path):
    chain = converted(FIXTURES / "deltas" / name, tmp_path)
    assert "cannot be merged" in merging.unmergeable(Zoo.open(tmp_path), chain.steps)
    with pytest.raises(ZooError, match="cannot be merged"):
        forward.load(Zoo.open(tmp_path), chain.steps)


def test_an_adapter_on_an_adapter_acts_on_what_that_made():
    """DoRA scales the rows that the scales before it have changed, as it does when it is served."""
    rng = np.random.default_rng(0)
    weight, a, b = (rng.standard_normal(s).astype("f4") for s in ((6, 4), (2, 4), (6, 2)))
    magnitude, scale = rng.random(6).astype("f4") + 1, rng.random((6, 1)).astype("f4")
    values = {"up.weight": weight.copy()}
    spec = dataclasses.replace(zoos.FFN, gated=False)
    dora = LoraSpec(targets={"up": LoraTarget(rank=2, scale=0.5, dora=True)})
    merging.merge(spec, values, Ia3Spec(outputs=("up",)), {"up.scale": scale})
    merging.merge(spec, values, dora, {"up.a": a, "up.b": b, "up.magnitude": magnitude})
    whole = weight * scale + 0.5 * b @ a
    expected = whole * (magnitude / np.linalg.norm(whole, axis=1))[:, None]
    np.testing.assert_allclose(values["up.weight"], expected, rtol=1e-5)
    values = {"up.weight": np.zeros((6, 4), "f4")}
    with pytest.raises(ZooError, match="norm zero"):
        merging.merge(spec, values, dora, {"up.a": a, "up.b": 0 * b, "up.magnitude": magnitude})


def test_gradients_are_those_of_small_steps(tmp_path):
    zoo = Zoo.create(tmp_path)
    weights = forward.load(zoo, zoos.fill(zoo).steps)
    layer = weights.part(1, 2)
    x = jax.random.normal(jax.random.key(0), (2, 3, zoos.HIDDEN))

    def loss(up):
        tensors = {**layer.tensors[0], "up.weight": up}
        return jnp.sum(forward.run(forward.Weights(layer.specs, (tensors,)), x) ** 2)

    up = layer.tensors[0]["up.weight"]
    gradient = jax.grad(loss)(up)
    step = jnp.zeros_like(up).at[2, 1].set(1e-2)
    slope = (loss(up + step) - loss(up - step)) / 2e-2
    np.testing.assert_allclose(gradient[2, 1], slope, rtol=2e-2)
