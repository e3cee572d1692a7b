"""Calls as they come over gRPC."""

from typing import Literal

import grpc

from serving.authentication import caller
from serving.call_info import CallInfo, request_id_of


def grpc_call(
    protocol: Literal["grpc", "open_inference"],
    context: grpc.aio.ServicerContext,
    request_id: str = "",
) -> CallInfo:
    """The call that a handler answers. Its id is `request_id`, else that of its metadata."""
    given = dict(context.invocation_metadata() or ()).get("x-request-id")
    call = CallInfo(
        protocol=protocol, tenant=caller(), request_id=request_id_of(request_id or given)
    )
    # A place is taken until the answer is sent, and not only computed: what nobody reads lies in memory. grpc
    # calls back once its client has taken all.
    context.add_done_callback(lambda _: call.held.close())
    return call
