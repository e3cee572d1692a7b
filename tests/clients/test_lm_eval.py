"""`lm-evaluation-harness` as it is published, with the server's own tokenizer routes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import server_harness as harness

completions = pytest.importorskip("lm_eval.models.openai_completions")
instance = pytest.importorskip("lm_eval.api.instance")
pytestmark = pytest.mark.clients

sys.path.insert(0, str(Path(__file__).parent.parent))
FIXTURE = Path(__file__).parent.parent / "fixtures" / "hf" / "llama_gqa_untied"


def likelihood(*pairs):
    return [
        instance.Instance("loglikelihood", {}, arguments=pair, idx=at)
        for at, pair in enumerate(pairs)
    ]


def test_local_completions(running):
    base_url = f"http://127.0.0.1:{running.server.http_port}/m/echo/v1/completions"
    model = completions.LocalCompletionsAPI(
        base_url=base_url, model="echo", tokenizer_backend="remote", tokenized_requests=True
    )
    # The mock gives every token -0.25, and every other one is the best there.
    found = model.loglikelihood(likelihood(("hello", " the cat"), ("hello the", " cat")))
    assert [score for score, _ in found] == pytest.approx([-0.5, -0.25])
    assert [bool(is_greedy) for _, is_greedy in found] == [False, True]
    until = instance.Instance(
        "generate_until",
        {},
        arguments=("hello the cat", {"until": ["cat"], "max_gen_toks": 8}),
        idx=0,
    )
    assert model.generate_until([until]) == ["hello the "]


def test_local_chat_completions(running):
    base_url = f"http://127.0.0.1:{running.server.http_port}/v1/chat/completions"
    model = completions.LocalChatCompletion(base_url=base_url, model="echo")
    chat = model.apply_chat_template([{"role": "user", "content": "hello the cat"}])
    arguments = (chat, {"until": ["cat"], "max_gen_toks": 12})
    asked = instance.Instance("generate_until", {}, arguments=arguments, idx=0)
    assert model.generate_until([asked]) == ["user: hello the "]


def test_log_likelihoods_of_a_real_model_are_those_of_transformers(tmp_path):
    from checkpoints import hf
    from checkpoints.progress import Progress
    from jblock.engine.process.client import ProcessEngine

    hf.convert(FIXTURE, tmp_path / "zoo", "good", Progress(False, quiet=True))
    settings = {"max_num_seqs": 4, "max_model_len": 160, "decode_sizes": [4]}
    settings |= {"page_size": 16, "prefill_grids": [[4, 16]], "kv_memory_mb": 1}
    kwargs = {"zoo": str(tmp_path / "zoo"), "executable_cache": str(tmp_path / "programs")}
    engine = ProcessEngine("jblock.engine.factory:build_engine", {**kwargs, **settings})
    engine.models()
    with np.load(FIXTURE / "oracle.npz") as arrays:
        prompt, logits = arrays["prompt"].tolist(), arrays["logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    with harness.serving(engine, http_port=0) as running:
        model = completions.LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{running.server.http_port}/v1/completions",
            model="good",
            tokenizer_backend=None,
            tokenized_requests=False,
        )
        # The fixture has no tokenizer; the harness only looks whether there is one.
        model.tokenizer, model.tokenized_requests = object(), True
        # As the harness asks once it has encoded: (texts, ids of the context, ids of what follows).
        cut = 40
        asked = [(("c", "t"), prompt[:at], prompt[at : at + 8]) for at in range(8, 64, 8)]
        asked.append((("c", "t"), prompt[:cut], [int(logits[cut - 1].argmax())]))
        found = model._loglikelihood_tokens(asked)
    for (_, context, rest), (score, is_greedy) in zip(asked, found, strict=True):
        at = len(context) - 1
        if rest == prompt[at + 1 : at + 1 + len(rest)] or len(rest) == 1:
            rows = logprobs[at : at + len(rest)]
            assert score == pytest.approx(rows[np.arange(len(rest)), rest].sum(), abs=1e-3)
            assert bool(is_greedy) == bool((rows.argmax(axis=1) == rest).all())
    assert found[-1][1]
