"""The `Inference` service: what happens to one generation."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
from absl import logging

from jblock.engine import api
from serving.changes import Changes
from serving.dispatcher import Dispatcher
from serving.errors import RequestError
from serving.generation import Answer, Answers, collect, sample
from serving.metrics import Metrics
from serving.tenants import Tenant, Tenants
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.validation import (
    check_policy,
    num_samples,
    prompt_ids,
    sampling_params,
    stop_strings,
)


class Inference(jblock_pb2_grpc.InferenceServicer):
    """Generation."""

    def __init__(
        self, dispatcher: Dispatcher, changes: Changes, tenants: Tenants, metrics: Metrics
    ):
        self._dispatcher, self._changes, self._tenants = dispatcher, changes, tenants
        self._metrics = metrics

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """GenerateStream, collected."""
        response = pb.GenerateResponse()
        async with self._answering(request, context) as parts:
            response = await collect(parts)
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Sends what each step brought; a slow reader gets several steps in one message."""
        async with self._answering(request, context) as parts:
            async for part in parts:
                try:
                    await context.write(part)
                except grpc.aio.InternalError as error:
                    # The client has gone, and grpc has not yet cancelled this task for it.
                    raise asyncio.CancelledError from error

    @contextlib.asynccontextmanager
    async def _answering(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[AsyncIterator[pb.GenerateStreamResponse]]:
        """The parts of the answer; whatever ends it becomes a status and a count."""
        code, message = grpc.StatusCode.OK, ""
        begin = time.monotonic()
        try:
            tenant = self._tenants.find(context.invocation_metadata())
            # A place is taken until the answer is sent, and not only computed: what nobody reads lies
            # in memory. grpc calls back once its client has taken all.
            held = contextlib.ExitStack()
            context.add_done_callback(lambda _: held.close())
            async with contextlib.aclosing(self._parts(request, tenant, begin, held)) as parts:
                yield parts
        except RequestError as error:
            code, message = error.code, error.message
        except asyncio.CancelledError:
            left = context.time_remaining()
            expired = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            message = "server: failed on this request; its log says how"
            logging.exception("answering a request failed")
        finally:
            # A name that is not served must not become a label: they would grow without bound.
            model = request.model if request.model in self._dispatcher.models else ""
            self._metrics.requests.labels(model, code.name).inc()
            self._metrics.request_time.labels(model).observe(time.monotonic() - begin)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, message)  # Last, so that who sees the status is counted.

    async def _parts(
        self, request: pb.GenerateRequest, tenant: Tenant, begin: float, held: contextlib.ExitStack
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Runs one request; once more where its model was swapped between our look and the engine's.
        Leaving early cancels it in the engine."""
        for is_last in (False, True):
            before = self._dispatcher.models.get(request.model)
            try:
                with contextlib.ExitStack() as admitted:
                    answers, usage = await self._submit(request, tenant, admitted, held)
                    while not answers.finished:
                        for part in await answers.parts():
                            if part.token_ids and not usage.completion_tokens:
                                usage.time_to_first_token = time.monotonic() - begin
                            usage.completion_tokens += len(part.token_ids)
                            if part.finish_reason and answers.finished:
                                usage.total_time = time.monotonic() - begin
                                part.usage.CopyFrom(usage)
                                self._count(request.model, usage)
                            yield part
                return
            except RequestError as error:
                if error.code is not grpc.StatusCode.ABORTED or is_last:
                    raise
            held.close()
            await self._changes.replaced(before)

    async def _submit(
        self,
        request: pb.GenerateRequest,
        tenant: Tenant,
        admitted: contextlib.ExitStack,
        held: contextlib.ExitStack,
    ) -> tuple[Answers, pb.Usage]:
        """Hands a request to the engine, which works on it until `admitted` is left; it has its places until
        `held` is left too."""
        model = self._dispatcher.find("model", request.model)
        info = model.info
        check_policy(request, info)
        stops = stop_strings(request, model)
        arrived = asyncio.Event()
        tickets = self._dispatcher.admit(arrived, tenant, num_samples(request))
        for ticket in tickets:
            admitted.enter_context(ticket)
            held.callback(self._dispatcher.leave, ticket)
        prompt = await prompt_ids(request, model)
        sampling = sampling_params(request, model, len(prompt))
        answers = []
        for index, ticket in enumerate(tickets):
            ticket.submit(
                api.Request(
                    request_id=ticket.request_id,
                    model=info.name,
                    token_ids=prompt,
                    sampling=sample(sampling, index),
                    cache_salt=tenant.cache_salt,
                    version=info.version,
                )
            )
            stream = TextStream(model.codec, stops, sampling.min_tokens)
            answers.append(Answer(index, ticket, stream, info))
        return Answers(answers, arrived), pb.Usage(prompt_tokens=len(prompt))

    def _count(self, model: str, usage: pb.Usage) -> None:
        self._metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)
        if usage.completion_tokens:
            self._metrics.time_to_first_token.labels(model).observe(usage.time_to_first_token)
