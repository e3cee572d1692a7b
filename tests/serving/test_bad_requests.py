"""Every bad request gets its status, a message that helps, and leaves the server as it was."""

import asyncio

import grpc
import pytest
import server_harness as harness
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serving import errors
from serving.client import Client
from serving.server import ServerConfig
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.values import ClientError

NAN = float("nan")


def ask(**fields):
    return harness.ids_request(**fields)


CASES = {
    "no model": (ask(model=""), "INVALID_ARGUMENT", "model: is empty; name a model"),
    "unknown model": (
        ask(model="nobody"),
        "NOT_FOUND",
        "model: 'nobody' is not served; choose one of adapter, broken, echo, ids, lora, rounded, small",
    ),
    "no prompt": (
        pb.GenerateRequest(model="echo"),
        "INVALID_ARGUMENT",
        "prompt: is missing; set text or token_ids",
    ),
    "empty text": (
        pb.GenerateRequest(model="echo", text=""),
        "INVALID_ARGUMENT",
        "text: is empty; send at least one character",
    ),
    "megabytes of text, which are not even encoded": (
        pb.GenerateRequest(model="echo", text="a " * 1_000_000),
        "INVALID_ARGUMENT",
        "text: prompt has 2000000 characters, echo takes at most 1023 tokens; shorten it",
    ),
    "no ids": (ask(ids=()), "INVALID_ARGUMENT", "token_ids: is empty; send at least one id"),
    "text for a model of ids": (
        pb.GenerateRequest(model="ids", text="x"),
        "INVALID_ARGUMENT",
        "text: ids has no tokenizer; send token_ids",
    ),
    "negative id": (
        ask(ids=(1, -1)),
        "INVALID_ARGUMENT",
        "token_ids[1]: -1 is no token id of echo; ids go from 0 to 409",
    ),
    "id past the vocabulary": (
        ask(ids=(410,)),
        "INVALID_ARGUMENT",
        "token_ids[0]: 410 is no token id of echo; ids go from 0 to 409",
    ),
    "long prompt": (
        ask(model="ids", ids=(1,) * 64),
        "INVALID_ARGUMENT",
        "token_ids: prompt has 64 tokens, ids takes at most 63; shorten it",
    ),
    "long text": (
        pb.GenerateRequest(model="echo", text="🙂" * 1024),
        "INVALID_ARGUMENT",
        "takes at most 1023; shorten it",
    ),
    "text past the vocabulary": (
        pb.GenerateRequest(model="small", text="the cat the cat sat on the mat"),
        "INVALID_ARGUMENT",
        "small has ids from 0 to 299; leave that token out",
    ),
    "negative temperature": (ask(temperature=-0.1), "INVALID_ARGUMENT", "temperature: -0.1 is not"),
    "temperature nan": (ask(temperature=NAN), "INVALID_ARGUMENT", "temperature: nan is not"),
    "temperature inf": (ask(temperature=1e999), "INVALID_ARGUMENT", "temperature: inf is not"),
    "temperature that is Inf in float32": (
        ask(temperature=1e39),
        "INVALID_ARGUMENT",
        "temperature: 1e+39 is above 1e+30; 0 is greedy",
    ),
    "repetition_penalty that is 0 in float32": (
        ask(repetition_penalty=1e-40),
        "INVALID_ARGUMENT",
        "repetition_penalty: 1e-40 is below 1e-06; 1 does nothing",
    ),
    "top_k": (ask(top_k=-1), "INVALID_ARGUMENT", "top_k: -1 is below 0; 0 keeps all"),
    "top_p 0": (ask(top_p=0), "INVALID_ARGUMENT", "top_p: 0.0 is outside (0, 1]; 1 keeps all"),
    "top_p 1.5": (ask(top_p=1.5), "INVALID_ARGUMENT", "top_p: 1.5 is outside (0, 1]"),
    "top_p nan": (ask(top_p=NAN), "INVALID_ARGUMENT", "top_p: nan is outside (0, 1]"),
    "max_tokens 0": (ask(max_tokens=0), "INVALID_ARGUMENT", "max_tokens: 0 is below 1"),
    "max_tokens -1": (ask(max_tokens=-1), "INVALID_ARGUMENT", "max_tokens: -1 is below 1"),
    "max_tokens past the end": (
        ask(model="ids", max_tokens=63),
        "INVALID_ARGUMENT",
        "max_tokens: 63 is more than the 62 tokens that ids has left after 2 of prompt",
    ),
    "empty stop": (ask(stop=["x", ""]), "INVALID_ARGUMENT", "stop[1]: is empty; leave it out"),
    "long stop": (ask(stop=["x" * 257]), "INVALID_ARGUMENT", "stop[0]: has 257 characters"),
    "many stops": (ask(stop=["x"] * 17), "INVALID_ARGUMENT", "stop: 17 strings are more than 16"),
    "stop for a model of ids": (
        ask(model="ids", stop=["x"]),
        "INVALID_ARGUMENT",
        "stop: ids has no tokenizer; use stop_token_ids",
    ),
    "stop id": (
        ask(stop_token_ids=[410]),
        "INVALID_ARGUMENT",
        "stop_token_ids[0]: 410 is no token id of echo",
    ),
    "many stop ids": (
        ask(stop_token_ids=[1] * 65),
        "INVALID_ARGUMENT",
        "stop_token_ids: 65 ids are more than 64; send fewer",
    ),
    "min_p": (ask(min_p=1.1), "INVALID_ARGUMENT", "min_p: 1.1 is outside [0, 1]; 0 keeps all"),
    "min_p nan": (ask(min_p=NAN), "INVALID_ARGUMENT", "min_p: nan is outside [0, 1]"),
    "repetition_penalty 0": (
        ask(repetition_penalty=0),
        "INVALID_ARGUMENT",
        "repetition_penalty: 0.0 is not a finite number > 0; 1 does nothing",
    ),
    "repetition_penalty inf": (
        ask(repetition_penalty=1e999),
        "INVALID_ARGUMENT",
        "repetition_penalty: inf is not a finite number > 0",
    ),
    "presence_penalty": (
        ask(presence_penalty=2.1),
        "INVALID_ARGUMENT",
        "presence_penalty: 2.1 is outside [-2, 2]; 0 does nothing",
    ),
    "frequency_penalty": (
        ask(frequency_penalty=NAN),
        "INVALID_ARGUMENT",
        "frequency_penalty: nan is outside [-2, 2]; 0 does nothing",
    ),
    "logit_bias id": (
        ask(logit_bias={410: 1.0}),
        "INVALID_ARGUMENT",
        "logit_bias[410]: is no token id of echo; ids go from 0 to 409",
    ),
    "logit_bias value": (
        ask(logit_bias={4: -100.5}),
        "INVALID_ARGUMENT",
        "logit_bias[4]: -100.5 is outside [-100, 100]; -100 forbids a token",
    ),
    "many biases": (
        ask(logit_bias={i: 1.0 for i in range(65)}),
        "INVALID_ARGUMENT",
        "logit_bias: 65 ids are more than 64; send fewer",
    ),
    "min_tokens": (
        ask(min_tokens=6, max_tokens=5),
        "INVALID_ARGUMENT",
        "min_tokens: 6 is outside 0 to max_tokens, 5; 0 lets the model end",
    ),
    "min_tokens -1": (ask(min_tokens=-1), "INVALID_ARGUMENT", "min_tokens: -1 is outside 0 to"),
    "top_logprobs": (
        ask(top_logprobs=21),
        "INVALID_ARGUMENT",
        "top_logprobs: 21 is outside 0 to 20; ask for fewer",
    ),
    "n 0": (ask(n=0), "INVALID_ARGUMENT", "n: 0 is outside 1 to 16"),
    "n 17": (ask(n=17), "INVALID_ARGUMENT", "n: 17 is outside 1 to 16; send several requests"),
    "one of several fails": (ask(model="broken", n=3), "INTERNAL", "model: told to fail"),
    "policy": (
        ask(model="rounded", policy=pb.POLICY_EXACT),
        "INVALID_ARGUMENT",
        "policy: model 'rounded' is POLICY_NEAR, which the request does not accept; set policy",
    ),
    "policy unset": (ask(model="rounded"), "INVALID_ARGUMENT", "policy: model 'rounded' is"),
    "no policy": (ask(policy=77), "INVALID_ARGUMENT", "policy: 77 is no policy"),
    "engine error": (ask(model="broken"), "INTERNAL", "model: told to fail; ask for another one"),
}


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_gets_its_status(fast, case, method):
    request, code, message = CASES[case]
    with pytest.raises(grpc.RpcError) as caught:
        list(getattr(fast.stub, method)(request))
    assert caught.value.code().name == code
    assert message in caught.value.details()
    assert fast.client.generate("echo", [300], max_tokens=1).token_ids == (300,)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a\x02\xff\xfe" + b"\x12\x01x",  # model is not UTF-8
        b"\x0a\x04echo" + b"\x12\x02\xc3\x28",  # text is not UTF-8
        b"\x0a\x04echo\x12\x01x" + b"\x4a\x01\x80",  # stop is not UTF-8
        b"\x0a\xff",  # cut off
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_bytes_that_are_no_request(fast, raw, method):
    kind = fast.channel.unary_stream if method == "GenerateStream" else fast.channel.unary_unary
    with pytest.raises(grpc.RpcError) as caught:
        list(kind(f"/jblock.v1.Inference/{method}", None, pb.GenerateResponse.FromString)(raw))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send the message of serving/v1/jblock.proto, its strings in UTF-8" in (
        caught.value.details()
    )
    assert fast.client.health() == "SERVING"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("", "INVALID_ARGUMENT", "name: is empty"),
        ("nobody", "NOT_FOUND", "name: 'nobody' is not served; choose one of adapter"),
    ],
)
def test_a_model_that_is_not_there(fast, name, code, message):
    with pytest.raises(ClientError) as caught:
        fast.client.model(name)
    assert caught.value.code == code
    assert message in caught.value.message


def test_an_unknown_method(fast):
    call = fast.channel.unary_unary("/jblock.v1.Inference/Nothing", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_full_queue_refuses_and_recovers(slow):
    streams = [slow.client.stream("echo", [300], max_tokens=900) for _ in range(4)]
    for stream in streams:
        next(stream)
    with pytest.raises(ClientError) as caught:
        slow.client.generate("echo", [300], max_tokens=1)
    assert caught.value.code == "UNAVAILABLE"
    assert "4 requests are open" in caught.value.message
    assert "--max_queue" in caught.value.message
    streams.pop().close()
    assert harness.eventually(lambda: slow.engine.stats().running == 3)
    assert slow.client.generate("echo", [300], max_tokens=1).token_ids == (300,)
    for stream in streams:
        stream.close()


@pytest.mark.parametrize(
    "sampling", [{"seed": 2**40}, {"seed": -1}, {"max_tokens": "many"}, {"colour": "red"}]
)
def test_values_that_fit_no_request_are_refused_by_the_client(sampling):
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match="request: "):
        client.generate("echo", "x", **sampling)


@pytest.mark.parametrize("prompt", [[2**40], [1.5], None, 7, "\ud800"])
def test_prompts_that_fit_no_request_are_refused_by_the_client(prompt):
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match="request: "):
        client.generate("echo", prompt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port: 70000 is no port"),
        ({"metrics_port": -1}, "metrics_port: -1 is no port"),
        ({"max_queue": 0}, "max_queue: 0 admits nothing"),
        ({"drain_seconds": -1.0}, "drain_seconds: -1.0 is below 0"),
    ],
)
def test_bad_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**fields)


def test_a_stub_of_the_proto_needs_no_more(fast):
    answer = jblock_pb2_grpc.ModelsStub(fast.channel).List(pb.ListModelsRequest())
    assert len(answer.models) == len(harness.MODELS)


def test_details_name_the_field_or_when_to_come_back(fast, slow):
    with pytest.raises(grpc.RpcError) as caught:
        fast.stub.Generate(ask(stop=["x", ""]))
    status = rpc_status.from_call(caught.value)
    (packed,) = status.details
    request = error_details_pb2.BadRequest()
    assert packed.Unpack(request) and [v.field for v in request.field_violations] == ["stop[1]"]
    stream = slow.client.stream("echo", [300], max_tokens=900, n=4)
    next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        slow.stub.Generate(ask())
    (packed,) = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert packed.Unpack(retry) and retry.retry_delay.seconds == 1
    stream.close()
    with pytest.raises(grpc.RpcError) as caught:
        fast.stub.Generate(ask(model="nobody"))
    assert rpc_status.from_call(caught.value) is None


@pytest.mark.parametrize("name", ["a" * 100_000, "é" * 50_000, "🙂" * 30_000, "\n%" * 40_000])
def test_names_of_any_length_are_refused_in_words(fast, name):
    for call in (
        lambda: fast.client.generate(name, [300]),
        lambda: fast.client.model(name),
        lambda: fast.client.load(name),
    ):
        with pytest.raises(ClientError, match=r"NOT_FOUND: (model|name): "):
            call()


def test_a_refusal_that_a_client_does_not_wait_for_is_no_failure_of_the_server():
    class Gone:
        """A call of which grpc has not yet told that its client has gone."""

        async def abort(self, code, message, metadata) -> None:
            raise grpc.aio.InternalError("Failed execute_batch")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(errors.abort(Gone(), errors.invalid("n: is 0; ask for one at least")))
