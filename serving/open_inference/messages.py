"""The messages of inference.proto, made from its description (inference.binpb; `make proto`).

They are in a pool of their own: other packages describe the same names, and a process takes one description
of a name in the pool that all share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FILE = Path(__file__).parent / "inference.binpb"
_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(_FILE.read_bytes()).file:
    _pool.Add(_file)
_SERVICE: Any = _pool.FindServiceByName("inference.GRPCInferenceService")
_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def __getattr__(name: str) -> Any:
    """A message's class."""
    try:
        return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))
    except KeyError:
        raise AttributeError(name) from None


def handlers(servicer: Any) -> Any:
    """The service, whose methods an object has under their names, for `add_generic_rpc_handlers`."""
    found: Mapping[str, Any] = {
        method.name: _KINDS[method.client_streaming, method.server_streaming](
            getattr(servicer, method.name),
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(
                method.output_type
            ).SerializeToString,
        )
        for method in _SERVICE.methods
    }
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, found)


class Stub:
    """The service from its client's side, with a method for each of its calls."""

    def __init__(self, channel: grpc.Channel):
        for method in _SERVICE.methods:
            kind = channel.stream_stream if method.client_streaming else channel.unary_unary
            call = kind(
                f"/{_SERVICE.full_name}/{method.name}",
                message_factory.GetMessageClass(method.input_type).SerializeToString,
                message_factory.GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)
