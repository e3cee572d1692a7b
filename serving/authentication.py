"""Lets nobody in without a key, whichever route they ask for."""

import contextvars
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from serving.errors import RequestError, abort
from serving.tenants import Tenant, Tenants
from serving.tls import peer_of_grpc

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


class PeerAuthentication(grpc.aio.ServerInterceptor):
    """The same on a port where every client has a certificate: that says who it is, or else its key. It is
    looked at for every call: a certificate that is revoked ends no later than the call."""

    def __init__(self, tenants: Tenants, on_refusal: Callable[[], None]):
        """`on_refusal` is called for each refused call."""
        self._tenants, self._on_refusal = tenants, on_refusal

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the call, which looks who asks before it answers."""
        handler = await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata

        def checked(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            async def respond(request: Any, context: grpc.aio.ServicerContext) -> Any:
                await self._admit(metadata, context)
                return await answer(request, context)

            return respond

        if handler is None:
            # Nobody learns which methods there are.
            async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
                await self._admit(metadata, context)
                unknown = RequestError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
                await abort(context, unknown)

            return grpc.stream_stream_rpc_method_handler(refuse)
        return _wrapped(handler, checked)

    async def _admit(self, metadata: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            _CALLER.set(self._tenants.find(metadata, peer_of_grpc(context.auth_context())))
        except RequestError as error:
            self._on_refusal()
            await abort(context, error)


def _wrapped(handler: Any, checked: Callable[[Any], Any]) -> Any:
    """A handler whose function is replaced by `checked` of it."""
    kind = "_".join(
        "stream" if streaming else "unary"
        for streaming in (handler.request_streaming, handler.response_streaming)
    )
    answer = getattr(handler, kind)
    if inspect.isasyncgenfunction(answer):
        return handler._replace(**{kind: _generating(answer, checked)})
    return handler._replace(**{kind: checked(answer)})


def _generating(answer: Callable[[Any, Any], Any], checked: Callable[[Any], Any]) -> Any:
    """The same of a handler that yields its messages."""

    async def nothing(request: Any, context: grpc.aio.ServicerContext) -> None:
        return None

    async def respond(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await checked(nothing)(request, context)
        async for message in answer(request, context):
            yield message

    return respond


def _refusal(error: RequestError) -> grpc.RpcMethodHandler:
    """A handler that reads nothing; on the wire it stands for every kind of method."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
