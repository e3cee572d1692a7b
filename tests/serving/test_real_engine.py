"""The server in front of the real engine: poisoned chains and swaps, over the wire."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import server_harness as harness
from http_harness import ask

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.process.client import ProcessEngine
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo
from serving.values import ClientError, to_request

FIXTURE = Path(__file__).parent.parent / "fixtures" / "hf" / "llama_gqa_untied"
SETTINGS = {
    "max_num_seqs": 4,
    "max_model_len": 160,
    "page_size": 16,
    "decode_sizes": [4],
    "prefill_grids": [[4, 16]],
    "kv_memory_mb": 1,
}


def poison(zoo: Zoo, name: str, kind: str) -> None:
    """Publishes the chain "good" again under this name, one of its components beyond float32's reach.

    The converter refuses NaN and Inf; numbers this large are finite and overflow when multiplied.
    """
    good = zoo.chain("good")
    steps = list(good.steps)
    kinds = [zoo.component(step.component).spec.kind for step in steps]
    at = len(kinds) - 1 - kinds[::-1].index(kind)
    record = zoo.component(steps[at].component)
    tensors = zoo.load_component(record.id)
    huge = {n: np.full_like(t, 3e38) if t.ndim == 2 else t for n, t in tensors.items()}
    steps[at] = Step(component=zoo.put_component(record.spec, huge, record.refs))
    zoo.publish(dataclasses.replace(good, name=name, version=0, steps=tuple(steps)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def running(folder):
    hf.convert(FIXTURE, folder / "zoo", "good", Progress(False, quiet=True))
    zoo = Zoo.open(folder / "zoo")
    poison(zoo, "bad-ffn", "ffn")
    poison(zoo, "bad-attention", "attention")
    kwargs = {"zoo": str(zoo.path), "models": ["good", "bad-ffn"], **SETTINGS}
    engine = ProcessEngine("jblock.engine.factory:build_engine", kwargs)
    engine.models()
    with harness.serving(engine, http_port=0) as one:
        yield one


def oracle():
    with np.load(FIXTURE / "oracle.npz") as arrays:
        return arrays["prompt"].tolist(), tuple(arrays["greedy"].tolist())


def test_a_poisoned_chain_fails_its_own_requests_only(running):
    prompt, greedy = oracle()
    for bad in ("bad-ffn", "bad-attention", "bad-ffn"):  # later turns reuse what the poison left
        running.client.load(bad)
        good = running.client.stream("good", prompt, max_tokens=len(greedy), ignore_eos=True)
        chunks = [next(good)]
        for prompt_ids in (prompt, prompt[:5]):
            with pytest.raises(ClientError) as caught:
                running.client.generate(bad, prompt_ids, max_tokens=20)
            assert caught.value.code == "INTERNAL"
            assert f"model '{bad}' version 1 computed NaN or Inf" in caught.value.message
        chunks += good
        assert tuple(t for c in chunks for t in c.token_ids) == greedy
    assert (
        running.client.generate("good", prompt, max_tokens=8, ignore_eos=True).token_ids
        == (greedy[:8])
    )
    assert harness.eventually(running.is_empty)
    assert running.engine.stats().compiles_on_serving_path == 0
    assert running.client.health() == "SERVING"


def test_what_does_not_fit_is_refused_and_the_rest_goes_on(running, folder):
    prompt, greedy = oracle()
    other = FIXTURE.parent / "qwen3_qknorm"
    hf.convert(other, folder / "zoo", "other", Progress(False, quiet=True))
    # Another hidden size and KV shape: it fits, and leaves again.
    assert running.client.load("other").name == "other"
    assert running.client.generate("other", [5, 6, 7], max_tokens=2).token_ids
    running.client.unload("other")
    with pytest.raises(ClientError, match="NOT_FOUND: name: 'nobody' is not in the zoo"):
        running.client.load("nobody")
    answer = running.client.generate("good", prompt, max_tokens=len(greedy), ignore_eos=True)
    assert answer.token_ids == greedy


def test_log_likelihoods_over_http_are_those_of_transformers(running):
    """As evaluation harnesses ask: the prompt's log-probabilities, and whether each token is the
    greedy one."""
    prompt, greedy = oracle()
    with np.load(FIXTURE / "oracle.npz") as arrays:
        logits = arrays["logits"][: len(prompt) - 1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    content = {"model": "good", "prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = ask(running.server.http_port, "/v1/completions", {**content, "temperature": 0})
    (choice,) = answer.json["choices"]
    found = choice["logprobs"]
    scored, tops = found["token_logprobs"][1:-1], found["top_logprobs"][1:-1]
    assert found["tokens"][:-1] == [str(token) for token in prompt]
    places = np.arange(len(prompt) - 1)
    np.testing.assert_allclose(scored, expected[places, prompt[1:]], atol=1e-3)
    is_greedy = [score == max(top.values()) for score, top in zip(scored, tops, strict=True)]
    gaps = np.diff(np.partition(logits, -2)[:, -2:])[:, 0]
    clear = gaps > 1e-3
    assert clear.sum() > len(places) // 2
    wanted = expected.argmax(axis=1) == prompt[1:]
    assert (np.array(is_greedy)[clear] == wanted[clear]).all()
    whole = {"model": "good", "prompt": prompt, "max_tokens": len(greedy), "temperature": 0}
    answer = ask(
        running.server.http_port, "/v1/completions", {**whole, "ignore_eos": True, "logprobs": 0}
    )
    assert tuple(map(int, answer.json["choices"][0]["logprobs"]["tokens"])) == greedy


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "drawn"])
def test_an_answer_goes_on_from_what_was_delivered(running, sampling):
    prompt, _ = oracle()
    sampling |= {"max_tokens": 12, "ignore_eos": True, "frequency_penalty": 0.5}
    whole = running.client.generate("good", prompt, **sampling).token_ids
    for at in (1, 7, 11):
        request = to_request("good", prompt, sampling)
        request.resume.token_ids[:] = whole[:at]
        rest = [i for m in running.stub.GenerateStream(request) for i in m.token_ids]
        assert (*whole[:at], *rest) == whole


def test_blocks_say_what_they_did(running):
    prompt, _ = oracle()
    running.client.generate("good", prompt, max_tokens=3, ignore_eos=True)
    stats = running.engine.stats()
    assert len({b.block for b in stats.blocks}) == len(stats.blocks)
    assert {b.kind for b in stats.blocks} == {"embedding", "layer", "head"}
    # "good" and the poisoned chains part where a component is another; the embedding is all of theirs.
    (embedding,) = [b for b in stats.blocks if b.kind == "embedding"]
    assert embedding.models == len(running.client.models())
    assert all(0 < b.batches <= b.rows for b in stats.blocks if b.models == embedding.models)
    assert all(b.weight_bytes > 0 and b.queue_rows == 0 for b in stats.blocks)
    assert sum(b.weight_bytes for b in stats.blocks) <= stats.resident_bytes
