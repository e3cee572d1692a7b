"""The standard health service, `grpc.health.v1.Health`: Check, List and Watch."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.errors import RequestError, abort, exhausted

# Watchers at a time: each is a stream for as long as its client likes, which a key may not even be
# needed for.
MAX_WATCHERS = 100

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Whether the server serves; all its services do, or none."""

    def __init__(self, services: tuple[str, ...]):
        """`services` are the names that may be asked for; "" is the whole server."""
        self._services = ("", *services)
        self._status = _NOT_SERVING
        self._changed: asyncio.Event = asyncio.Event()
        self._watchers = 0

    def set(self, serving: bool) -> None:
        """Tells watchers too."""
        self._status = _SERVING if serving else _NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service."""
        if request.service not in self._services:
            words = f"service: {request.service[:80]!r} is none of this server; leave it empty for all of it"
            await abort(context, RequestError(grpc.StatusCode.NOT_FOUND, words))
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """The status of every service. Older grpc_health has no such method, and never calls it."""
        status = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """The status of one service, and again whenever it changes."""
        if self._watchers >= MAX_WATCHERS:
            await abort(
                context,
                exhausted(
                    f"health: {MAX_WATCHERS} calls watch already; use Check, or try again later"
                ),
            )
        self._watchers += 1
        try:
            sent = None
            while True:
                changed = self._changed  # Before the status is read, so that no change is missed.
                status = self._status if request.service in self._services else _UNKNOWN
                if status != sent:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    sent = status
                await changed.wait()
        finally:
            self._watchers -= 1
