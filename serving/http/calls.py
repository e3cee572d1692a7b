"""What every generation over HTTP goes through: the tenant, the count, refusals, a client that leaves."""

import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol

import grpc
from absl import logging

from serving.answers import Part
from serving.call_info import CallInfo, request_id_of
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, invalid
from serving.generation import Ask, Generator
from serving.http import errors, events
from serving.http.connection import SCOPE_KEY
from serving.http.errors import Headers
from serving.http.events import Prepared
from serving.http.exchange import Left, Receive, Scope, Send, Sender, header, read_body, unless_left
from serving.metrics import Metrics
from serving.tenants import Tenant, Tenants

_INTERNAL = RequestError(
    grpc.StatusCode.INTERNAL, "server: failed on this request; its log says how"
)


@dataclasses.dataclass(kw_only=True)
class Call:
    """One request of a client.

    Attributes:
      scope: of ASGI: headers, and the parameters of the path.
      body: as it came.
      sender: sends the answer.
      info: who asks, and when.
      model: whom it asked, once that is known; for the count.
    """

    scope: Scope
    body: bytes
    sender: Sender
    info: CallInfo
    model: str = ""

    @property
    def tenant(self) -> Tenant:
        """Who asks."""
        return self.info.tenant

    def name(self, given: str | None) -> str:
        """The model that is asked: that of the path `/m/<model>/...`, or of the body.

        Raises:
          RequestError: they differ.
        """
        path = self.scope.get("path_params", {}).get("model")
        if path and given and given != path:
            raise invalid(
                f"model: {given[:80]!r} is not {path[:80]!r}, which the path names; leave it out"
            )
        self.model = path or given or ""
        return self.model


Handler = Callable[[Call], Awaitable[None]]


class Calls:
    """Makes ASGI applications of handlers."""

    def __init__(
        self, dispatcher: Dispatcher, generator: Generator, tenants: Tenants, metrics: Metrics
    ):
        self.dispatcher, self.generator = dispatcher, generator
        self._tenants, self._metrics = tenants, metrics

    def parts(
        self, call: Call, asks: Sequence[Ask], field: str = "n"
    ) -> AsyncGenerator[Part, None]:
        """The answers to a call; close it to cancel them."""
        return self.generator.parts(asks, call.info, field)

    async def stream(
        self, call: Call, asks: Sequence[Ask], answer: "Streamed", field: str = "n"
    ) -> None:
        """Sends the answers to a call as events, but for what comes after the last."""
        sink = _Sink(call.sender, answer)
        parts = self.generator.parts(asks, call.info, field, sink)
        async with contextlib.aclosing(parts):
            async for part in parts:
                await call.sender.events(answer.events(part))

    def tenant(self, scope: Scope) -> Tenant:
        """Who asks.

        Raises:
          RequestError: nobody that is known.
        """
        values = header(scope, b"authorization")
        try:
            found = [("authorization", value) for value in values]
            return self._tenants.find(found, scope.get("state", {}).get("peer"))
        except RequestError as error:
            self._metrics.refused.inc()
            message = error.message.replace("metadata: needs", "needs the header", 1)
            raise RequestError(error.code, message) from error

    def endpoint(
        self, handler: Handler, *, counted: bool = True, open_: bool = False
    ) -> "Endpoint":
        """The application of a handler.

        Args:
          handler: sends the answer to a call, or raises RequestError.
          counted: it is a generation, which the metrics count.
          open_: it asks for no key.
        """
        return Endpoint(self, handler, counted, open_)

    def headers(self, info: CallInfo) -> Headers:
        """The id of a call, and what is left of its tenant's quotas."""
        found = self.dispatcher.quotas.headers(info.tenant)
        return [(n.encode(), v.encode()) for n, v in (("x-request-id", info.request_id), *found)]


class Streamed(Protocol):
    """What makes events of an answer."""

    def events(self, part: Part) -> bytes:
        """Those of a part."""
        ...

    def prepared(self, index: int) -> Prepared | None:
        """That of further text of an answer; None: it has more in it than that."""
        ...


class _Sink:
    """Sends the events of parts as they come."""

    def __init__(self, sender: Sender, answer: Streamed):
        self._sender, self._answer = sender, answer
        self._prepared: Prepared | None = None

    @property
    def ready(self) -> bool:
        return self._sender.ready

    def push(self, part: Part) -> None:
        body = self._answer.events(part)
        if body:
            self._sender.push(body)

    def goes_on(self, part: Part) -> bool:
        self._prepared = self._answer.prepared(part.index)
        return self._prepared is not None

    def push_text(self, text: str, token_ids: Sequence[int]) -> None:
        if text and self._prepared is not None:
            self._sender.push(self._prepared.of(text))


class Endpoint:
    """An ASGI application that answers one route."""

    def __init__(self, calls: Calls, handler: Handler, counted: bool, open_: bool):
        self._calls, self._handler = calls, handler
        self._counted, self._open = counted, open_

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = Sender(send, scope.get(SCOPE_KEY))
        # Places are given back once uvicorn has taken all of the answer, of which it keeps 64 KB at most.
        with contextlib.ExitStack() as held:
            try:
                tenant = None if self._open else self._calls.tenant(scope)
            except RequestError as error:
                await refuse(sender, error)
                return
            info = CallInfo(
                protocol="http",
                tenant=tenant or Tenant(name=""),
                request_id=request_id_of(next(iter(header(scope, b"x-request-id")), None)),
                held=held,
            )
            if tenant is not None:
                sender.headers = functools.partial(self._calls.headers, info)
            call = Call(scope=scope, body=b"", sender=sender, info=info)
            code = grpc.StatusCode.CANCELLED
            refusal: RequestError | None = None
            try:
                call.body = await read_body(scope, receive)
                await unless_left(self._handler(call), receive)
                code = grpc.StatusCode.OK
            except Left:
                return
            except RequestError as error:
                code, refusal = error.code, error
            except Exception:
                logging.exception("answering a request failed")
                code, refusal = grpc.StatusCode.INTERNAL, _INTERNAL
            finally:
                if self._counted:
                    self._calls.generator.ended(call.info, call.model, code, refusal)
            if refusal is not None:
                await refuse(sender, refusal)  # Last, so that who sees the status is counted.


async def refuse(sender: Sender, error: RequestError) -> None:
    """Answers with an error; where the answer has begun, as its last event."""
    status = errors.status_of(error)
    body = errors.body_of(error, status)
    if sender.started:
        await sender.events(events.event(body))
        await sender.end()
    else:
        await sender.json(body, status, errors.headers_of(error, status))
