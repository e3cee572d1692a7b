"""Refusals as gRPC statuses. A request either succeeds or ends with one; there are no flags."""

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

# A message travels as metadata, of which clients take 8 KB for all of an answer.
_MAX_MESSAGE_BYTES = 2500
# Seconds after which a refused request may be sent again. Places become free as answers end.
RETRY_AFTER = 1.0
# Clients obey no longer waits.
_MAX_RETRY_AFTER = 120.0
# How a message begins that names a field: "max_tokens: ...", "stop[1]: ...", "chat.messages[0].role: ...".
_FIELD = re.compile(r"([A-Za-z_]\w*(?:[.\[]\w+\]?)*): ")
# Words at the beginning of a message that are no fields of a request.
_NO_FIELDS = (
    "body",
    "engine",
    "server",
    "queue",
    "metadata",
    "certificate",
    "tenant",
    "max_requests",
    "requests_per_minute",
    "tokens_per_minute",
    "deadline",
    "health",
)
_LATER = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


class RequestError(Exception):
    """Ends one request with a status; the message says what was given, expected, and what to do.

    Attributes:
      code: the status.
      message: cut where it would not fit the metadata of an answer.
      by_tenant: RESOURCE_EXHAUSTED because of what this tenant has open, and not because of the others.
      retry_after: seconds after which it may succeed, where it may at all.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        by_tenant: bool = False,
        retry_after: float = RETRY_AFTER,
    ):
        message = fitting(message)
        super().__init__(message)
        self.code = code
        self.message = message
        self.by_tenant = by_tenant
        self.retry_after = min(retry_after, _MAX_RETRY_AFTER)


def fitting(message: str) -> str:
    """As much of a message as fits the metadata, where grpc writes what is not ASCII as %XX."""
    left = _MAX_MESSAGE_BYTES
    for at, character in enumerate(message):
        plain = " " <= character <= "~" and character != "%"
        left -= 1 if plain else 3 * len(character.encode("utf-8", "replace"))
        if left < 0:
            return message[:at]
    return message


def named_first(error: RequestError) -> str | None:
    """What a refusal says it is about: a field of the request, or "queue", "engine" and so on."""
    found = _FIELD.match(error.message)
    return found[1] if found else None


def field_of(error: RequestError) -> str | None:
    """The field of the request that a refusal names; None: it names none."""
    name = named_first(error)
    return name if name and name.split("[")[0] not in _NO_FIELDS else None


def details(error: RequestError) -> tuple[tuple[str, bytes], ...]:
    """The `google.rpc.Status` of a refusal, as metadata: the field that is wrong, or when to come back."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    field = field_of(error)
    if error.code is grpc.StatusCode.INVALID_ARGUMENT and field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.code in _LATER:
        whole = int(error.retry_after)
        nanos = int((error.retry_after - whole) * 1e9)
        delay = duration_pb2.Duration(seconds=whole, nanos=nanos)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return (("grpc-status-details-bin", status.SerializeToString()),) if status.details else ()


async def abort(context: grpc.aio.ServicerContext, error: RequestError) -> None:
    """Ends a call with a refusal.

    Raises:
      CancelledError: the client has gone.
    """
    try:
        await context.abort(error.code, error.message, details(error))
    except grpc.aio.InternalError as failure:
        # grpc has not yet cancelled this task for it.
        raise asyncio.CancelledError from failure


def invalid(message: str) -> RequestError:
    """INVALID_ARGUMENT."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def unavailable(message: str) -> RequestError:
    """UNAVAILABLE."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, message)


def exhausted(
    message: str, by_tenant: bool = False, retry_after: float = RETRY_AFTER
) -> RequestError:
    """RESOURCE_EXHAUSTED."""
    return RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, by_tenant, retry_after)


def from_engine(code: str, message: str) -> RequestError:
    """The error of an engine's Output. An unknown code is INTERNAL."""
    status = grpc.StatusCode.__members__.get(code, grpc.StatusCode.INTERNAL)
    return RequestError(status, message or f"the engine failed this request with {code!r}")


# Services, and where their messages are described.
_PROTOS = {
    "jblock.": "serving/v1/jblock.proto",
    "inference.": "serving/open_inference/inference.proto",
}


@dataclasses.dataclass(frozen=True)
class _Undecodable:
    """Stands for a request that is no message, until its handler can answer."""

    message: str


class DecodeErrors(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to bytes that are no request, such as a string not in UTF-8, and lets handlers
    answer with messages that are encoded already.

    Without it grpc answers INTERNAL, as if the fault were the server's, and logs a traceback.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handlers of the services that answer requests."""
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.strip("/").rpartition("/")[0]
        file = next((f for prefix, f in _PROTOS.items() if service.startswith(prefix)), None)
        if handler is None or file is None:
            return handler
        parse, serialize = handler.request_deserializer, handler.response_serializer

        def deserialize(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError as error:
                return _Undecodable(
                    f"request: {len(data)} bytes could not be decoded ({error}); send the message "
                    f"of {file}, its strings in UTF-8"
                )

        def encode(message: Any) -> bytes:
            return message if isinstance(message, bytes) else serialize(message)

        def checked(answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
            async def respond(request: Any, context: grpc.aio.ServicerContext) -> Any:
                if isinstance(request, _Undecodable):
                    await abort(context, invalid(request.message))
                return await answer(request, context)

            return respond

        def checked_stream(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            async def respond(requests: Any, context: grpc.aio.ServicerContext) -> Any:
                return await answer(_decoded(requests), context)

            return respond

        if handler.request_streaming:
            answers = {"stream_stream": checked_stream(handler.stream_stream)}
        else:
            kind = "unary_stream" if handler.response_streaming else "unary_unary"
            answers = {kind: checked(getattr(handler, kind))}
        return handler._replace(
            request_deserializer=deserialize, response_serializer=encode, **answers
        )


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream's requests.

    Raises:
      RequestError: the next one is no message.
    """
    async for request in requests:
        if isinstance(request, _Undecodable):
            raise invalid(request.message)
        yield request
