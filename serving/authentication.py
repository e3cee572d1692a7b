"""Lets nobody in without a key, whichever route they ask for."""

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from serving.errors import RequestError, abort
from serving.tenants import Tenant, Tenants

_CALLER: contextvars.ContextVar[Tenant] = contextvars.ContextVar("caller")


def caller() -> Tenant:
    """The tenant of the gRPC call that is being answered.

    Raises:
      LookupError: nobody has looked who it is.
    """
    return _CALLER.get()


class Authentication(grpc.aio.ServerInterceptor):
    """Refuses calls that bring no tenant's key, before a byte of their request is read.

    It stands before every service, health and reflection too, and before unknown methods, so that a
    route added later is closed as well. Handlers find out who asks with `caller`.
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
                _CALLER.set(self._tenants.find(handler_call_details.invocation_metadata))
            except RequestError as error:
                self._on_refusal()
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: RequestError) -> grpc.RpcMethodHandler:
    """A handler that reads nothing; on the wire it stands for every kind of method."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
