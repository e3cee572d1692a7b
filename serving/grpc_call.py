"""Calls as they come over gRPC, and the messages of their answers."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

import grpc

from serving.answers import Part, Sink
from serving.authentication import caller
from serving.call_info import CallInfo, request_id_of
from serving.messages import constant_of, plain_bytes, to_bytes


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


class Writer(Sink):
    """Writes the parts of one answer, one after the other. What is pushed is written without a task: one
    would be woken for each message and again once that is sent."""

    def __init__(self, context: grpc.aio.ServicerContext):
        self._context = context
        self._constant = b""  # What all messages of the answer have.
        self._pushed: Coroutine[Any, Any, None] | None = None  # The write that is under way.
        self._over: asyncio.Future[None] | None = None  # Its end, where somebody waits for it.

    @property
    def ready(self) -> bool:
        """See `Sink`."""
        return self._pushed is None

    def push(self, part: Part) -> None:
        """See `Sink`."""
        self._push(to_bytes(part))

    def goes_on(self, part: Part) -> bool:
        """See `Sink`."""
        self._constant = constant_of(part)
        return True

    def push_text(self, text: str, token_ids: Sequence[int]) -> None:
        """See `Sink`."""
        self._push(plain_bytes(text, token_ids, self._constant))

    async def write(self, part: Part) -> None:
        """Writes one, after what was pushed.

        Raises:
          CancelledError: the client has gone.
        """
        await self.written()
        try:
            await self._context.write(to_bytes(part))
        except grpc.aio.InternalError as error:
            # grpc has not yet cancelled this task for it.
            raise asyncio.CancelledError from error

    async def written(self) -> None:
        """Waits until what was pushed is sent."""
        if self._pushed is not None:
            self._over = asyncio.get_running_loop().create_future()
            await self._over

    def _push(self, message: bytes) -> None:
        self._pushed = self._context.write(message)
        self._go_on()

    def _go_on(self, _: object = None) -> None:
        """Runs the write up to what it waits for next, or to its end."""
        assert self._pushed is not None
        waits_for: asyncio.Future[Any] | None = None
        try:
            waits_for = self._pushed.send(None)
        except (StopIteration, grpc.aio.BaseError):
            pass  # Of a client that has gone the next write says so, unless grpc ends the call before it.
        finally:
            if waits_for is not None:
                waits_for.add_done_callback(self._go_on)
            else:
                self._pushed = None
                if self._over is not None and not self._over.done():
                    self._over.set_result(None)
