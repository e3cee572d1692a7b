"""Logits and greedy tokens against Hugging Face transformers and peft, float32.

Logits within 1e-4 absolute for every position, both when a prompt is computed in chunks and token by
token; 64 greedy tokens identical.
"""

import dataclasses

import numpy as np
import pytest
from harness import ADAPTERS, BASES, Agent, base_of, oracle

from jblock.engine.config import EngineConfig

TOLERANCE = 1e-4
# Chunks of 16 and one row a call; a second sequence rides along so that batching is always on.
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=192,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=4,
)


# The maths of these is held to the same oracles in tests/families/test_oracles.py, and the engine serves
# others of their kinds, with adapters too; so here they take their turn in the long tests.
LONG = (
    *("cohere", "cohere2", "falcon3", "gemma", "gemma3_vision", "glm", "glm4", "granite4"),
    *("llama_biases", "ministral", "mistral3", "olmo3", "phi3_mini", "qwen2_5_vl", "qwen3_biases"),
    *("qwen3_vl", "smollm3", "starcoder2"),
    *(
        "llama_head_dim",
        "llama_bf16",
        "llama_fp16",
        "llama_sharded",
        "mistral_nowindow",
        "qwen2_window",
    ),
    *("qwen3_moe", "gemma2", "olmo2", "granite", "ministral3"),
    *("smollm3_lora", "glm4_lora", "cohere2_lora", "lora_rslora_r16", "qwen3_lora_all_r8"),
)


def fixtures() -> list:
    """Every fixture, the long ones marked."""
    marks = {name: [pytest.mark.long] for name in LONG}
    return [pytest.param(name, marks=marks.get(name, [])) for name in (*BASES, *ADAPTERS)]


@pytest.fixture(params=fixtures())
def agent(request, zoo) -> tuple[str, Agent]:
    """One fixture served with its base, if it has one, in the same batches."""
    name = request.param
    models = [name] if name in BASES else [name, base_of(name)]
    return name, Agent.make(zoo, models, CONFIG)


def test_matches_the_oracle(agent):
    name, agent = agent
    expected = oracle(name)
    prompt, greedy = expected["prompt"], expected["greedy"]
    mate = name if name in BASES else base_of(name)

    # Greedy tokens and the logits behind them: prefill in chunks, then one token at a time.
    tokens = agent.generate(
        {
            "long": (name, prompt),
            "short": (name, expected["prompt_short"]),
            "mate": (mate, prompt[:37]),
        }
    )
    assert tokens["long"] == greedy.tolist()
    assert tokens["short"] == expected["greedy_short"].tolist()
    wanted = {len(prompt) - 1: expected["logits"][-1]}
    wanted |= {len(prompt) + i: row for i, row in enumerate(expected["greedy_logits"][1:])}
    compare(agent, "long", wanted, len(wanted))

    # Every position of the prompt as the last of a chunked prefill.
    agent.device.seen.clear()
    lengths = [n for n in range(1, len(prompt) + 1) if n % 7 == 1 or n % 16 in (0, 1)]
    agent.generate({f"n{n}": (name, prompt[:n]) for n in lengths}, max_tokens=1)
    for n in lengths:
        compare(agent, f"n{n}", {n - 1: expected["logits"][n - 1]}, 1)

    # Every position token by token, the prompt forced.
    agent.device.seen.clear()
    agent.generate({"forced": (name, prompt[:1])}, max_tokens=1)
    force(agent, name, prompt)


def compare(agent: Agent, request_id: str, wanted: dict[int, np.ndarray], count: int) -> None:
    """Holds the logits seen for a request against {position: logits}."""
    found = 0
    for batch, logits in agent.device.seen:
        for i, item in enumerate(batch.items):
            position = item.start + item.q_len - 1
            if item.sequence.request.request_id == request_id and position in wanted:
                np.testing.assert_allclose(logits[i], wanted[position], atol=TOLERANCE, rtol=0)
                found += 1
    assert found == count


def force(agent: Agent, name: str, prompt: np.ndarray) -> None:
    """Feeds the prompt one token a step through the decode path and compares every position."""
    expected = oracle(name)["logits"]
    agent.loop.submit(request_for(name, prompt))
    stepper = agent.loop._stepper
    run = stepper.run

    def one_token_each(items, *rest):
        # What the prompt says stands where the sampled token would.
        forced = [dataclasses.replace(i, tokens=(int(prompt[i.start]),)) for i in items]
        return run(forced, *rest)

    agent.device.seen.clear()
    stepper.run = one_token_each
    agent.run()
    stepper.run = run
    compare(agent, "force", dict(enumerate(expected)), len(prompt))


def request_for(name: str, prompt: np.ndarray):
    """A request whose first token is the prompt's first and whose output length is the rest."""
    from harness import request

    return request("force", name, prompt[:1], max_tokens=len(prompt))
