"""Activated LoRA: its tokens and logits are peft's, and what comes before its invocation is its base's."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from harness import FIXTURES, SMALL, Agent, request
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.engine.scheduling.sequence import NEVER, invoked_at

BASE, NAME, PLAIN = "llama_gqa_untied", "alora_all_r8", "plain"
CONFIG = dataclasses.replace(SMALL, max_model_len=128, kv_memory_mb=4)
PAGE = CONFIG.page_size
# Where each prompt of the oracle invokes it, in tokens.
INVOKED = {"late": 37, "twice": 40, "first": 0, "last": 58, "page": 32, "never": NEVER}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The adapter, its base, and the same tensors as a plain LoRA."""
    path, quiet = tmp_path_factory.mktemp("activated"), Progress(False)
    source, plain = FIXTURES / "activated" / NAME, path / PLAIN
    shutil.copytree(source, plain)
    config = json.loads((plain / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = None
    (plain / "adapter_config.json").write_text(json.dumps(config))
    hf.convert(FIXTURES / "hf" / BASE, path / "zoo", BASE, quiet)
    peft.convert(source, path / "zoo", BASE, NAME, quiet)
    peft.convert(plain, path / "zoo", BASE, PLAIN, quiet)
    return path / "zoo"


@pytest.fixture
def agent(folder):
    """All three, with nothing cached yet."""
    return Agent.make(folder, [BASE, NAME, PLAIN], CONFIG)


@pytest.fixture(scope="module")
def oracle():
    with np.load(FIXTURES / "activated" / NAME / "oracle.npz") as arrays:
        return {n: {k: arrays[f"{n}.{k}"] for k in ("prompt", "logits", "greedy")} for n in INVOKED}


def test_answers_are_those_of_peft(agent, oracle):
    """Together, with their base and the plain LoRA beside them, and then again from what is cached."""
    prompts = {name: (NAME, of["prompt"]) for name, of in oracle.items()}
    beside = {f"{m} {n}": (m, of["prompt"]) for n, of in oracle.items() for m in (BASE, PLAIN)}
    wanted = {name: of["greedy"].tolist() for name, of in oracle.items()}
    first = agent.generate(prompts | beside, max_tokens=24)
    assert {name: first[name] for name in wanted} == wanted
    # One that is never invoked is its base.
    assert first["never"] == first[f"{BASE} never"] and first["first"] == first[f"{PLAIN} first"]
    late = {"late": prompts["late"]}
    hits = [(agent.generate(late, max_tokens=24), agent.loop.kv.hit_tokens) for _ in range(2)]
    assert hits[1][0]["late"] == wanted["late"] and hits[1][1] - hits[0][1] == 3 * PAGE


def test_logits_of_a_prompt_are_those_of_peft(agent, oracle):
    for name, of in oracle.items():
        agent.loop.submit(request(name, NAME, of["prompt"], max_tokens=1, prompt_logprobs=True))
    for name, outputs in agent.run().items():
        logits = oracle[name]["logits"][:-1].astype(np.float64)
        following = np.asarray(oracle[name]["prompt"][1:])
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = scores[np.arange(len(following)), following]
        np.testing.assert_allclose(outputs[-1].prompt_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("before, after", [(BASE, NAME), (NAME, BASE)])
def test_pages_before_the_invocation_are_the_base_s(agent, oracle, before, after):
    """Found by the one where the other computed them; those behind are found by neither."""
    kv, of = agent.loop.kv, oracle
    agent.generate({n: (before, of[n]["prompt"]) for n in of}, max_tokens=1)
    for name, at in INVOKED.items():
        hits = kv.hit_tokens
        tokens = agent.generate({"r": (after, of[name]["prompt"])}, max_tokens=24)["r"]
        assert kv.hit_tokens - hits == min(at, 59) // PAGE * PAGE, name
        assert after != NAME or tokens == of[name]["greedy"].tolist()
    hits = kv.hit_tokens
    agent.generate({"r": (PLAIN, of["late"]["prompt"])}, max_tokens=1)
    assert kv.hit_tokens == hits


def test_an_invocation_that_was_generated_is_none(agent, oracle):
    """As peft has it: the same tokens invoke it as a prompt, and are computed another way."""
    prompt = oracle["late"]["prompt"]
    at = INVOKED["late"]
    force = [(int(token), 50.0) for token in prompt[at : at + 1]]
    before = prompt[: at + 1]
    kv = agent.loop.kv
    agent.generate({"r": (NAME, before)}, max_tokens=60, logit_bias=tuple(force))
    hits = kv.hit_tokens
    twice = np.concatenate([before, np.full(40, prompt[at]), prompt[at : at + 2]])
    agent.generate({"again": (NAME, twice)}, max_tokens=1)
    # Up to what was generated it is the base, whose pages were computed as such.
    assert kv.hit_tokens - hits == (len(before) + 40) // PAGE * PAGE


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=3))
def test_it_is_invoked_where_its_tokens_stand_last(tokens, invocation):
    at = invoked_at(tokens, invocation)
    places = [
        i
        for i in range(len(tokens) - len(invocation) + 1)
        if tokens[i : i + len(invocation)] == invocation
    ]
    assert at == (0 if not invocation else places[-1] if places else NEVER)
