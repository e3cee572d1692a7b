"""`tritonclient[grpc]` as it is published."""

import queue

import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.clients


@pytest.fixture
def client(running):
    with triton.InferenceServerClient(running.target) as one:
        yield one


def tensor(name, value, kind):
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(np.array([value], np.object_ if kind == "BYTES" else bool))
    return made


def asked(stream):
    return [
        tensor("text_input", b"hello the cat", "BYTES"),
        tensor("stream", stream, "BOOL"),
        tensor("exclude_input_in_output", True, "BOOL"),
        tensor("sampling_parameters", b'{"temperature": 0, "max_tokens": 6}', "BYTES"),
    ]


def test_life(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("echo")
    assert client.get_server_metadata().name == "jblock"
    assert client.get_model_metadata("echo").inputs[0].name == "text_input"


def test_a_whole_answer(client):
    result = client.infer("echo", asked(False), request_id="1")
    assert result.as_numpy("text_output")[0] == b"hello the cat" * 2


def test_a_stream(client):
    arrived = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    client.async_stream_infer("echo", asked(True), enable_empty_final_response=True)
    client.async_stream_infer("nobody", asked(True), request_id="bad")
    texts, failed, ended = [], 0, False
    while not (ended and failed):
        result, error = arrived.get(timeout=30)
        if error is not None:
            failed += 1
            continue
        response = result.get_response()
        ended |= response.parameters["triton_final_response"].bool_param
        if response.outputs:
            texts.append(result.as_numpy("text_output")[0])
    client.stop_stream()
    assert b"".join(texts) == b"hello the cat" * 2
