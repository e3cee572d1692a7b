"""Every sampling option reaches the engine as it was given, and what the engine brings comes back."""

import asyncio
import dataclasses
import json

import grpc
import pytest
import server_harness as harness

from jblock.engine import api
from serving import client_main
from serving.client import AsyncClient
from serving.v1 import jblock_pb2 as pb

OPTIONS = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -2.0,
    "frequency_penalty": 2.0,
    "logit_bias": {9: -100.0, 4: 1.5},
    "seed": 2**32 - 1,
    "max_tokens": 3,
    "min_tokens": 2,
    "stop_token_ids": [8],
    "ignore_eos": True,
    "top_logprobs": 2,
    "prompt_logprobs": True,
}


@pytest.fixture
def submitted(fast, monkeypatch):
    """The sampling of every request handed to the engine from now on."""
    seen = []
    submit = fast.engine.submit

    def spy(request):
        seen.append(request.sampling)
        submit(request)

    monkeypatch.setattr(fast.engine, "submit", spy)
    return seen


def test_options_reach_the_engine(fast, submitted):
    fast.client.generate("echo", [300, 301], **OPTIONS)
    fast.client.generate("echo", [300, 301])
    wanted = {**OPTIONS, "logit_bias": ((4, 1.5), (9, -100.0)), "stop_token_ids": (8,)}
    assert submitted == [
        api.SamplingParams(**wanted, logprobs=True),
        api.SamplingParams(),
    ]


def test_the_best_and_the_prompt_come_back(fast, slow):
    options = {"max_tokens": 3, "top_logprobs": 2, "prompt_logprobs": True}
    answer = fast.client.generate("echo", [300, 301, 302], **options)
    assert answer.logprobs == (-0.5,) * 3
    assert answer.top_logprobs == tuple(((t, -0.5), (t + 1, -1.0)) for t in (300, 301, 302))
    assert answer.prompt_logprobs == (-0.25, -0.25)
    chunks = list(slow.client.stream("echo", [300, 301, 302], **options))
    assert sum((c.top_logprobs for c in chunks), ()) == answer.top_logprobs
    assert sum((c.prompt_logprobs for c in chunks), ()) == answer.prompt_logprobs


def test_samples_have_seeds_of_their_own_and_come_together(fast, submitted):
    options = {"max_tokens": 4, "n": 3, "seed": 2**32 - 2, "prompt_logprobs": True}
    answer = fast.client.generate("echo", "cat", temperature=1.0, **options)
    assert [s.seed for s in submitted] == [2**32 - 2, 2**32 - 1, 0]
    assert [s.prompt_logprobs for s in submitted] == [True, False, False]
    assert len(answer.choices) == 3
    first = answer.choices[0]
    assert (first.text, first.token_ids) == (answer.text, answer.token_ids)
    assert len({choice.token_ids for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert len(choice.token_ids) == 4
        assert choice.finish_reason == answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(answer.prompt_logprobs) + 1
    assert fast.client.generate("echo", "cat", max_tokens=4).choices == ()
    assert harness.eventually(fast.is_empty)


def test_a_stream_of_samples_names_each_and_ends_once(slow):
    chunks = list(slow.client.stream("echo", "the cat", max_tokens=5, n=4))
    texts = {i: "".join(c.text for c in chunks if c.index == i) for i in range(4)}
    assert len(set(texts.values())) == 1
    for i in range(4):
        reasons = [c.finish_reason for c in chunks if c.index == i]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]


def test_leaving_a_stream_frees_every_sample(slow):
    async def leave():
        async with AsyncClient(slow.target) as client:
            stream = client.stream("echo", "the cat", max_tokens=900, n=4)
            await anext(stream)
            assert slow.server._dispatcher.num_open == 4
            await stream.aclose()

    asyncio.run(leave())
    assert harness.eventually(slow.is_empty)


def test_samples_take_a_place_each(tmp_path):
    with harness.serving(harness.mock(tmp_path), max_queue=4) as running:
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Generate(harness.ids_request(n=5))
        # So many places will never be there: not a matter of waiting.
        assert caught.value.code().name == "INVALID_ARGUMENT"
        assert "n: asks for 5 answers at once, and at most 4" in caught.value.details()
        assert harness.eventually(running.is_empty)


def test_an_engine_that_dies_ends_all_samples(tmp_path):
    engine = harness.mock(tmp_path, die_after_steps=3)
    with harness.serving(engine) as running:
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Generate(harness.ids_request(n=3, max_tokens=50))
        assert caught.value.code().name == "UNAVAILABLE"


def test_min_tokens_hold_off_eos_and_stop_strings(fast):
    assert fast.client.generate("ids", [8, 1], max_tokens=6).token_ids == ()
    late = fast.client.generate("ids", [8, 1], max_tokens=6, min_tokens=3)
    assert late.token_ids == (9, 2, 9, 2)[: len(late.token_ids)] and len(late.token_ids) >= 3
    text = "abcabcabc"
    for min_tokens, wanted in ((0, "a"), (1, "a"), (2, "abca"), (5, "abcabca")):
        answer = fast.client.generate("echo", text, max_tokens=9, min_tokens=min_tokens, stop=["b"])
        assert (answer.text, answer.finish_reason) == (wanted, "stop")


def test_fields_of_both_answers_agree():
    """A stream is collected by merging its messages' bytes."""
    parts = pb.GenerateStreamResponse.DESCRIPTOR.fields_by_name
    whole = pb.GenerateResponse.DESCRIPTOR.fields_by_name
    numbers = {f.number for f in whole.values()}
    for name, field in parts.items():
        if name == "index":
            assert field.number not in numbers
        else:
            assert (field.number, field.type) == (whole[name].number, whole[name].type)


def test_the_command_takes_every_option(fast, submitted, capsys):
    flags = ["--token_ids=300,301", "--n=2", "--logprobs"]
    for name, value in OPTIONS.items():
        if isinstance(value, bool):
            flags.append(f"--{name}")
        elif isinstance(value, dict):
            flags.append(f"--{name}=" + ",".join(f"{k}={v}" for k, v in value.items()))
        else:
            flags.append(f"--{name}={value[0] if isinstance(value, list) else value}")

    def run(*more):
        argv = ["jblock-client", f"--target={fast.target}", "generate", "--model=echo"]
        return client_main.main(client_main.parse([*argv, *flags, *more]))

    assert run("--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["choices"]) == 2 and answer["prompt_logprobs"] == [-0.25]
    first = submitted[0]
    for name, value in OPTIONS.items():
        if name not in ("logit_bias", "stop_token_ids"):
            assert getattr(first, name) == value
    assert first.logit_bias == ((4, 1.5), (9, -100.0))
    assert submitted[1] == dataclasses.replace(first, seed=0, prompt_logprobs=False)
    assert run("--stream") == 2
    assert "add --json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--logit_bias=5:1")
