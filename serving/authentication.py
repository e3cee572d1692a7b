"""Lets nobody in without a key, whichever route they ask for."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from serving.errors import RequestError, abort
from serving.tenants import Tenants


class Authentication(grpc.aio.ServerInterceptor):
    """Refuses calls that bring no tenant's key, before a byte of their request is read.

    It stands before every service, health and reflection too, and before unknown methods, so that a
    route added later is closed as well. Handlers that care who asks look the tenant up again.
    """

    def __init__(self, tenants: Tenants, open_health: bool, on_refusal: Callable[[], None]):
        """`open_health` lets health checks pass; `on_refusal` is called for each refused call."""
        self._tenants, self._on_refusal = tenants, on_refusal
        self._open = f"/{health.SERVICE_NAME}/" if open_health else None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the call, or one that refuses it."""
        if self._open is None or not handler_call_details.method.startswith(self._open):
            try:
                self._tenants.find(handler_call_details.invocation_metadata)
            except RequestError as error:
                self._on_refusal()
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: RequestError) -> grpc.RpcMethodHandler:
    """A handler that reads nothing; on the wire it stands for every kind of method."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
