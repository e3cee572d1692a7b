"""The offline forward pass against what transformers and peft computed, and its gradients."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoos

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.adapt import forward
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


def test_adapters_are_merged(tmp_path):

    folder = sorted((FIXTURES / "peft").iterdir())[0]
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    hf.convert(FIXTURES / "hf" / base, tmp_path, base, QUIET)
    chain, _ = peft.convert(folder, tmp_path, base, "a", QUIET)
    expected = oracle(folder)
    weights = forward.load(Zoo.open(tmp_path), chain.steps)
    _, logits = forward.outputs(weights, expected["prompt"][None])
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-4, rtol=0)


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
