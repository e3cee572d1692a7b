"""A client that knows nothing but the address: it builds what it sends from the server's reflection."""

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

pytestmark = pytest.mark.clients


class Service:
    """A service whose calls take and give plain dictionaries."""

    def __init__(self, channel, name):
        self._channel = channel
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self._service = pool.FindServiceByName(name)

    def call(self, method, content):
        """The answers, one or a stream of them."""
        described = self._service.methods_by_name[method]
        given, taken = (
            message_factory.GetMessageClass(t)
            for t in (described.input_type, described.output_type)
        )
        kind = "unary_stream" if described.server_streaming else "unary_unary"
        path = f"/{self._service.full_name}/{method}"
        call = getattr(self._channel, kind)(path, given.SerializeToString, taken.FromString)
        answer = call(json_format.ParseDict(content, given()))
        answers = answer if described.server_streaming else [answer]
        return [json_format.MessageToDict(a, preserving_proto_field_name=True) for a in answers]


def test_everything_is_described(running):
    with grpc.insecure_channel(running.target) as channel:
        inference = Service(channel, "jblock.v1.Inference")
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        (whole,) = inference.call("Generate", {"model": "echo", "chat": chat, "max_tokens": 5})
        parts = inference.call("GenerateStream", {"model": "echo", "chat": chat, "max_tokens": 5})
        assert "".join(p.get("text", "") for p in parts) == whole["text"]
        (ids,) = inference.call("Tokenize", {"model": "echo", "text": "hello the cat"})
        (text,) = inference.call("Detokenize", {"model": "echo", **ids})
        assert text == {"text": "hello the cat"}
        (listed,) = Service(channel, "jblock.v1.Models").call("List", {})
        assert "echo" in [model["name"] for model in listed["models"]]
