"""Every family's maths against transformers: the logits of whole prompts, block by block, without an engine.

`tests/engine/test_parity.py` holds the engine to the same oracles.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.opening import open_checkpoint
from jblock.adapt.forward import Weights, outputs

FIXTURES = Path(__file__).parent.parent / "fixtures" / "hf"
BASES = sorted(p.parent.name for p in FIXTURES.glob("*/oracle.npz"))


@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_transformers(name):
    checkpoint = open_checkpoint(FIXTURES / name)
    read = checkpoint.source.read
    tensors = [
        {n: jnp.asarray(read(of), jnp.float32) for n, of in step.tensors.items()}
        for step in checkpoint.plan.steps
    ]
    weights = Weights(tuple(s.spec for s in checkpoint.plan.steps), tuple(tensors))
    with np.load(FIXTURES / name / "oracle.npz") as oracle:
        prompt, wanted = oracle["prompt"], oracle["logits"]
    _, logits = outputs(weights, prompt[None])
    np.testing.assert_allclose(np.asarray(logits)[0], wanted, atol=1e-4, rtol=0)
