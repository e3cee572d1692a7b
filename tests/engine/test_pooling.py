"""What a model makes of a prompt, pooled: as transformers has it behind the final norm."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from harness import FIXTURES, SMALL, Agent, request

from checkpoints import hf
from checkpoints.progress import Progress

MODELS = ("llama_gqa_untied", "gemma2", "gpt2")
EXPECTED = dict(np.load(FIXTURES / "hidden_states.npz"))


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    path = tmp_path_factory.mktemp("pooling") / "zoo"
    for name in MODELS:
        hf.convert(FIXTURES / "hf" / name, path, name, Progress(False))

    config = dataclasses.replace(SMALL, max_model_len=160, kv_memory_mb=4)
    return Agent.make(Path(path), list(MODELS), config)


def prompt(name):
    with np.load(FIXTURES / "hf" / name / "oracle.npz") as arrays:
        return arrays["prompt"].tolist()


def embed(agent, wanted):
    """Vectors of {id: (model, prompt, pooling)}, computed together with a generation."""

    for name, (model, ids, pooling) in wanted.items():
        asked = request(name, model, ids, max_tokens=1)
        agent.loop.submit(dataclasses.replace(asked, pooling=pooling))
    agent.loop.submit(request("beside", MODELS[0], [1, 2, 3], max_tokens=8))
    outputs = agent.run()
    for name in wanted:
        (only,) = outputs[name]
        assert only.finish_reason == "stop" and not only.token_ids, only
    return {name: np.array(outputs[name][-1].embedding) for name in wanted}


def test_they_are_those_of_transformers(agent):
    wanted = {
        f"{model} {pooling}": (model, prompt(model), pooling)
        for model in MODELS
        for pooling in ("mean", "last")
    }
    for _ in range(2):  # The second time prompts are in the cache.
        found = embed(agent, wanted)
        for model in MODELS:
            hidden = EXPECTED[model]
            np.testing.assert_allclose(found[f"{model} mean"], hidden.mean(axis=0), atol=1e-4)
            np.testing.assert_allclose(found[f"{model} last"], hidden[-1], atol=1e-4)


def test_another_pooling_is_refused(agent):

    agent.loop.submit(dataclasses.replace(request("x", MODELS[0], [1, 2]), pooling="max"))
    (only,) = agent.run()["x"]
    assert only.error_code == "INVALID_ARGUMENT" and "pooling is 'max'" in only.error_message
