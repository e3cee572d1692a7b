"""Embeddings over both protocols, from the mock engine's vectors."""

import base64
import math
import struct

import grpc
import pytest
import server_harness as harness
from http_harness import ask

from serving.v1 import jblock_pb2 as pb


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = harness.mock(tmp_path_factory.mktemp("tokenizer"))
    with harness.serving(engine, http_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


def expected(tokens):
    length = math.hypot(3, -4, tokens)
    return pytest.approx([3 / length, -4 / length, tokens / length], abs=1e-6)


def test_over_grpc(running):
    answer = running.stub.Embed(pb.EmbedRequest(model="echo", text="hello the cat"))
    assert list(answer.embedding) == expected(3)
    assert (answer.prompt_tokens, answer.model, answer.policy) == (3, "echo", pb.POLICY_EXACT)
    ids = pb.TokenIds(ids=[5, 6])
    given = pb.EmbedRequest(model="echo", token_ids=ids, as_computed=True, pooling=pb.POOLING_MEAN)
    assert list(running.stub.Embed(given).embedding) == [3, -4, 2]
    with pytest.raises(grpc.RpcError) as caught:
        running.stub.Embed(pb.EmbedRequest(model="echo", text=""))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_over_http(running):
    def post(**fields):
        body = {"model": "echo", **fields}
        return ask(running.server.http_port, "/v1/embeddings", body)

    whole = post(input="hello the cat").json
    assert whole["data"][0]["embedding"] == expected(3) and whole["object"] == "list"
    assert whole["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    several = post(input=["hello", "the cat"], encoding_format="base64").json["data"]
    assert [d["index"] for d in several] == [0, 1]
    raw = base64.b64decode(several[1]["embedding"])
    assert list(struct.unpack("<3f", raw)) == expected(3)
    assert post(input=[5, 6, 7], normalize=False).json["data"][0]["embedding"] == [3, -4, 3]
    assert len(post(input=[[5], [6]]).json["data"]) == 2
    for fields, field in (
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": ["x", 5]}, "input"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "colour": 1}, "colour"),
    ):
        answer = post(**fields)
        assert (answer.status, answer.error["param"]) == (400, field)
