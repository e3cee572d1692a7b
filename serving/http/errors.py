"""Refusals as OpenAI's clients know them: a status, headers, and an object `error` that names the field."""

import math
import re

import grpc
import msgspec

from serving.errors import RequestError, field_of, invalid

Headers = list[tuple[bytes, bytes]]

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 404,
    grpc.StatusCode.ABORTED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNAVAILABLE: 503,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded", 503: "overloaded"}


class HTTPError(RequestError):
    """A refusal whose status gRPC has no word for."""

    def __init__(self, status: int, message: str, headers: Headers | None = None):
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, message)
        self.status = status
        self.headers = headers or []


def status_of(error: RequestError) -> int:
    """The HTTP status of a refusal: 429 where the tenant has too much open, 503 where all have."""
    if isinstance(error, HTTPError):
        return error.status
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return 429 if error.by_tenant else 503
    return _STATUS.get(error.code, 500)


def headers_of(error: RequestError, status: int) -> Headers:
    """What goes with the status."""
    if isinstance(error, HTTPError):
        return error.headers
    if status in (429, 503):
        return [(b"retry-after", str(max(math.ceil(error.retry_after), 1)).encode())]
    if status == 401:
        return [(b"www-authenticate", b"Bearer")]
    return []


def body_of(error: RequestError, status: int) -> bytes:
    """The object `error`."""
    field = field_of(error)
    code = _CODES.get(status)
    if status == 404 and field == "model":
        code = "model_not_found"
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": _TYPES.get(status, "server_error"),
                "param": field if status < 500 else None,
                "code": code,
            }
        }
    )


def undecodable(error: msgspec.MsgspecError | UnicodeError) -> RequestError:
    """The refusal of a body that is no such request; it names the field."""
    message = str(error)
    if unknown := re.search(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", message):
        inside = f"{unknown[2]}." if unknown[2] else ""
        return invalid(
            f"{inside}{unknown[1]}: this server has no such field; leave it out (docs/openai.md "
            f"lists those it has)"
        )
    if missing := re.search(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", message):
        inside = f"{missing[2]}." if missing[2] else ""
        return invalid(f"{inside}{missing[1]}: is missing; send it")
    if where := re.search(r" - at `\$\.?([^`]*)`$", message):
        field = where[1].replace("...", "value") or "body"
        return invalid(f"{field}: {message[: where.start()]}; send that")
    return invalid(f"body: is no JSON of a request ({message}); send an object in UTF-8")
