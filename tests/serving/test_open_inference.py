"""The Open Inference Protocol with the tensors of Triton's backends, from the mock engine."""

import json
import struct

import grpc
import pytest
import server_harness as harness

from serving.open_inference import messages as pb


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = harness.mock(tmp_path_factory.mktemp("tokenizer"), step_delay=0.001)
    with harness.serving(engine) as one:
        yield one
        assert harness.eventually(one.is_empty)


@pytest.fixture(scope="module")
def stub(running):
    return pb.Stub(running.channel)


def request(text="hello the cat", model="echo", id="", raw=True, parameters=None, **inputs):
    """Tensors of the types of their values; those of `sampling_parameters` as JSON."""
    made = pb.ModelInferRequest(model_name=model, id=id)
    for name, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(made.parameters[name], kind, value)
    for name, value in {"text_input": text, **inputs}.items():
        kind = {bool: "BOOL", int: "INT32", float: "FP32"}.get(type(value), "BYTES")
        tensor = made.inputs.add(name=name, datatype=kind, shape=[1])
        data = json.dumps(value) if isinstance(value, dict) else value
        if not raw:
            field = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "INT32": "int_contents"}
            data = data.encode() if kind == "BYTES" else data
            getattr(tensor.contents, field[kind]).append(data)
        elif kind == "BYTES":
            made.raw_input_contents.append(struct.pack("<I", len(data.encode())) + data.encode())
        else:
            letter = {"BOOL": "?", "INT32": "i", "FP32": "f"}[kind]
            made.raw_input_contents.append(struct.pack(f"<{letter}", data))
    return made


def outputs(response):
    found = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            values = []
            while data:
                size = struct.unpack("<I", data[:4])[0]
                values.append(data[4 : 4 + size].decode())
                data = data[4 + size :]
        else:
            letter = {"UINT32": "I", "FP32": "f"}[tensor.datatype]
            values = list(struct.unpack(f"<{tensor.shape[0]}{letter}", data))
        assert list(tensor.shape) == [len(values)]
        found[tensor.name] = values
    return found


GREEDY = {"temperature": 0.0, "max_tokens": 6}


def test_life_and_metadata(stub):
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="echo")).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="echo", version="3")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="echo", version="4")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="nobody")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "jblock"
    found = stub.ModelMetadata(pb.ModelMetadataRequest(name="echo"))
    assert found.versions == ["3"] and found.inputs[0].name == "text_input"
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("raw", [True, False])
def test_a_whole_answer(stub, raw):
    given = request(
        raw=raw,
        id="7",
        sampling_parameters=GREEDY,
        exclude_input_in_output=True,
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    response = stub.ModelInfer(given)
    assert (response.id, response.model_name, response.model_version) == ("7", "echo", "3")
    assert outputs(response) == {
        "text_output": ["hello the cat" * 2],
        "finish_reason": ["length"],
        "num_input_tokens": [3],
        "num_output_tokens": [6],
    }
    with_input = stub.ModelInfer(request(max_tokens=3, parameters={"temperature": 0.0}))
    assert outputs(with_input)["text_output"] == ["hello the cat" * 2]
    given = request(sampling_parameters={**GREEDY, "n": 2})
    given.outputs.add(name="text_output")
    assert len(outputs(stub.ModelInfer(given))["text_output"]) == 2


def test_a_stream_answers_each_request_and_survives_those_that_fail(stub):
    def asked():
        yield request(id="a", stream=True, sampling_parameters=GREEDY)
        yield request(id="bad", stream=True, sampling_parameters={"colour": 1})
        yield request(id="nobody", model="nobody")
        yield request(
            id="b",
            stream=True,
            sampling_parameters=GREEDY,
            parameters={"triton_enable_empty_final_response": True},
        )
        yield request(id="c", sampling_parameters=GREEDY, exclude_input_in_output=True)

    texts, finals, failed, empty = {}, {}, {}, []
    for message in stub.ModelStreamInfer(asked()):
        response = message.infer_response
        if message.error_message:
            failed[response.id] = message.error_message
            continue
        finals.setdefault(response.id, []).append(
            response.parameters["triton_final_response"].bool_param
        )
        if not response.outputs:
            empty.append(response.id)
            continue
        texts[response.id] = texts.get(response.id, "") + outputs(response)["text_output"][0]
    assert texts == {name: "hello the cat" * 2 for name in "abc"}
    assert "colour" in failed["bad"] and "not served" in failed["nobody"]
    assert empty == ["b"]
    assert all(found[-1] and not any(found[:-1]) for found in finals.values())


def test_refusals(stub):
    def refused(given):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(given)
        return caught.value.details()

    assert "text_input: is missing" in refused(pb.ModelInferRequest(model_name="echo"))
    assert "needs ModelStreamInfer" in refused(request(stream=True))
    assert "no such field" in refused(request(colour=5))
    assert "sampling_parameters: is no JSON" in refused(request(sampling_parameters="{"))
    short = request()
    short.raw_input_contents[0] = short.raw_input_contents[0][:-2]
    assert "end before they should" in refused(short)
    twice = request(max_tokens=3)
    twice.inputs[1].shape[0] = 2
    assert "for a shape of 2" in refused(twice)
    assert "is not there" in refused(_with_output("nothing"))


def _with_output(name):
    given = request(sampling_parameters=GREEDY)
    given.outputs.add(name=name)
    return given


def test_bytes_that_are_no_message(running):
    rubbish, service = b"\x0a\x02\xff\xff\xff", "/inference.GRPCInferenceService/"
    for method in ("ServerLive", "ModelReady", "ModelMetadata", "ModelInfer"):
        with pytest.raises(grpc.RpcError) as caught:
            running.channel.unary_unary(service + method)(rubbish, timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "could not be decoded" in caught.value.details()
    good = request().SerializeToString()
    stream = running.channel.stream_stream(service + "ModelStreamInfer")
    answers = stream(iter([good, rubbish, good]), timeout=20)
    assert next(answers)  # Of what came before.
    with pytest.raises(grpc.RpcError) as caught:
        list(answers)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "inference.proto" in caught.value.details()
