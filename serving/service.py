"""The two services of `jblock.v1`: what happens to one call."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
from absl import logging

from jblock.engine import api
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, invalid, unavailable
from serving.metrics import Metrics
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.validation import (
    ServedModel,
    check_policy,
    prompt_ids,
    sampling_params,
    stop_strings,
)

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def find_model(dispatcher: Dispatcher, field: str, name: str) -> ServedModel:
    """The model of this name.

    Raises:
      RequestError: there is none, or the engine is not there.
    """
    if not name:
        raise invalid(f"{field}: is empty; name a model, Models.List lists them")
    if not dispatcher.ready.is_set():
        raise unavailable("engine: is warming up; try again when health is SERVING")
    model = dispatcher.models.get(name)
    if model is None:
        names = ", ".join(sorted(dispatcher.models)[:8])
        more = ", ..." if len(dispatcher.models) > 8 else ""
        raise RequestError(
            grpc.StatusCode.NOT_FOUND,
            f"{field}: {name[:80]!r} is not served; choose one of {names}{more}",
        )
    return model


class Inference(jblock_pb2_grpc.InferenceServicer):
    """Generation."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics):
        self._dispatcher = dispatcher
        self._metrics = metrics

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """GenerateStream, collected."""
        response = pb.GenerateResponse()
        texts = []
        async with self._answering(request, context) as parts:
            async for part in parts:
                texts.append(part.text)
                part.text = ""
                # The fields have the same numbers in both messages.
                response.MergeFromString(part.SerializeToString())
        response.text = "".join(texts)
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
            async with contextlib.aclosing(self._parts(request, begin)) as parts:
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
        self, request: pb.GenerateRequest, begin: float
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Runs one request; leaving early cancels it in the engine."""
        model = find_model(self._dispatcher, "model", request.model)
        info = model.info
        check_policy(request)
        stops = stop_strings(request, model)
        with self._dispatcher.admit() as ticket:
            prompt = await prompt_ids(request, model)
            sampling = sampling_params(request, model, len(prompt))
            ticket.submit(
                api.Request(
                    request_id=ticket.request_id,
                    model=info.name,
                    token_ids=prompt,
                    sampling=sampling,
                )
            )
            stream = TextStream(model.codec, stops)
            usage = pb.Usage(prompt_tokens=len(prompt))
            finish_reason = None
            while finish_reason is None:
                output = await ticket.next()
                piece = stream.push(output.token_ids)
                finish_reason = "stop" if piece.stopped else output.finish_reason
                text = piece.text
                if finish_reason and not piece.stopped:
                    rest = stream.flush()
                    text += rest.text
                    finish_reason = "stop" if rest.stopped else finish_reason
                if piece.num_tokens and not usage.completion_tokens:
                    usage.time_to_first_token = time.monotonic() - begin
                usage.completion_tokens += piece.num_tokens
                part = pb.GenerateStreamResponse(
                    text=text,
                    token_ids=output.token_ids[: piece.num_tokens],
                    logprobs=output.logprobs[: piece.num_tokens],
                    policy=pb.POLICY_EXACT,
                    model=info.name,
                    model_version=info.version,
                )
                if finish_reason:
                    usage.total_time = time.monotonic() - begin
                    part.finish_reason = _FINISH[finish_reason]
                    part.usage.CopyFrom(usage)
                    self._count(info.name, usage)
                yield part

    def _count(self, model: str, usage: pb.Usage) -> None:
        self._metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)
        if usage.completion_tokens:
            self._metrics.time_to_first_token.labels(model).observe(usage.time_to_first_token)


class Models(jblock_pb2_grpc.ModelsServicer):
    """What is served."""

    def __init__(self, dispatcher: Dispatcher):
        self._dispatcher = dispatcher

    async def List(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """All models, by name."""
        if not self._dispatcher.ready.is_set():
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                "engine: is warming up; try again when health is SERVING",
            )
        models = sorted(self._dispatcher.models.values(), key=lambda m: m.info.name)
        return pb.ListModelsResponse(models=[_model(m) for m in models])

    async def Get(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        """One model."""
        try:
            return _model(find_model(self._dispatcher, "name", request.name))
        except RequestError as error:
            await context.abort(error.code, error.message)
            raise


def _model(model: ServedModel) -> pb.Model:
    info = model.info
    return pb.Model(
        name=info.name,
        version=info.version,
        family=info.family,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        has_tokenizer=model.codec is not None,
        base=info.base,
        blocks=info.blocks,
        shared_blocks=info.shared_blocks,
    )
