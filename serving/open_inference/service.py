"""The service `inference.GRPCInferenceService`: what Triton's clients and KServe ask."""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from absl import logging

from serving.answers import Part
from serving.authentication import caller
from serving.call_info import CallInfo, request_id_of
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, abort, invalid
from serving.generation import Generator
from serving.grpc_call import grpc_call
from serving.open_inference import messages as pb
from serving.open_inference.requests import INPUTS, Wanted, wanted_of
from serving.open_inference.tensors import add_output
from serving.served_models import ServedModel

# Requests of one stream that are answered at a time; more are not read.
_MOST_AT_ONCE = 16
_OUTPUTS = (
    ("text_output", "BYTES"),
    ("finish_reason", "BYTES"),
    ("cumulative_logprob", "FP32"),
    ("num_input_tokens", "UINT32"),
    ("num_output_tokens", "UINT32"),
)


class OpenInference:
    """Answers it."""

    def __init__(self, dispatcher: Dispatcher, generator: Generator):
        self._dispatcher, self._generator = dispatcher, generator

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        """It answers, so it lives."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        """Whether requests are taken and computed."""
        return pb.ServerReadyResponse(ready=self._dispatcher.serves)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        """Whether a model is served to the caller."""
        try:
            self._find(request.name, request.version)
        except RequestError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._dispatcher.serves)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        """Who this is."""
        try:
            version = importlib.metadata.version("jblock")
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        return pb.ServerMetadataResponse(name="jblock", version=version, extensions=["parameters"])

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        """The tensors of a model: those of every language model here."""
        try:
            info = self._find(request.name, request.version).info
        except RequestError as error:
            await abort(context, error)
            raise
        response = pb.ModelMetadataResponse(
            name=info.name, versions=[str(info.version)], platform="jblock"
        )
        for name, kind in INPUTS:
            response.inputs.add(name=name, datatype=kind, shape=[1])
        for name, kind in _OUTPUTS:
            response.outputs.add(name=name, datatype=kind, shape=[-1])
        return response

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """A whole answer."""
        call = grpc_call("open_inference", context, request.id)
        try:
            responses = [r async for r in self._responses(request, call, streaming=False)]
        except RequestError as error:
            await abort(context, error)
            raise
        return responses[0]

    async def ModelStreamInfer(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Answers to requests as they come, each in one response or in parts. What fails, fails alone;
        what is no request ends the stream, once those before it are answered."""
        refused: RequestError | None = None
        tenant, places = caller(), asyncio.Semaphore(_MOST_AT_ONCE)
        writing = asyncio.Lock()

        async def send(message: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(message)

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                # Places are given back once grpc has taken all of the answer.
                call = CallInfo(
                    protocol="open_inference", tenant=tenant, request_id=request_id_of(request.id)
                )
                with call.held:
                    found = self._responses(request, call, streaming=True)
                    async with contextlib.aclosing(found) as responses:
                        async for response in responses:
                            await send(pb.ModelStreamInferResponse(infer_response=response))
            except RequestError as error:
                failed = pb.ModelStreamInferResponse(error_message=error.message)
                failed.infer_response.id = request.id
                failed.infer_response.model_name = request.model_name
                await send(failed)
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    async for request in requests:
                        await places.acquire()
                        tasks.create_task(answer(request))
                except RequestError as error:
                    refused = error
        except* grpc.aio.InternalError as group:
            # The client has gone, and grpc has not yet cancelled this task for it.
            raise asyncio.CancelledError from group
        if refused is not None:
            await abort(context, refused)

    async def _responses(
        self,
        request: pb.ModelInferRequest,
        call: CallInfo,
        *,
        streaming: bool,
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """One response, or those of a stream.

        Raises:
          RequestError: it cannot be served.
        """
        code = grpc.StatusCode.CANCELLED
        refusal: RequestError | None = None
        try:
            self._find(request.model_name, request.model_version)
            wanted = wanted_of(request, streaming)
            answer = _Answer(request, wanted)
            generation = self._generator.parts([wanted.ask], call)
            async with contextlib.aclosing(generation) as parts:
                async for part in parts:
                    answer.add(part)
                    if wanted.stream and (part.text or part.is_last):
                        yield answer.response(part.is_last)
            if not wanted.stream:
                yield answer.response(True)
            if wanted.empty_final and streaming:
                yield answer.empty()
            code = grpc.StatusCode.OK
        except RequestError as error:
            code, refusal = error.code, error
            raise
        except Exception as error:
            logging.exception("answering a request failed")
            code = grpc.StatusCode.INTERNAL
            words = "server: failed on this request; its log says how"
            raise RequestError(code, words) from error
        finally:
            self._generator.ended(call, request.model_name, code, refusal)

    def _find(self, name: str, version: str) -> ServedModel:
        """A model that the caller may use, in the version asked for.

        Raises:
          RequestError: there is none.
        """
        model = self._dispatcher.find("model_name", name, caller())
        if version not in ("", str(model.info.version)):
            raise invalid(
                f"model_version: {name} is served in version {model.info.version}, not {version[:20]}; "
                "leave it out"
            )
        return model


class _Answer:
    """What has come of an answer and was not sent."""

    def __init__(self, request: pb.ModelInferRequest, wanted: Wanted):
        self._request, self._wanted = request, wanted
        self._texts: dict[int, str] = {}
        self._reasons: dict[int, str] = {}
        self._totals: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._prompt_tokens = 0
        self._version = ""

    def add(self, part: Part) -> None:
        """Takes a part."""
        at = part.index
        self._texts[at] = self._texts.get(at, "") + part.text
        self._reasons[at] = part.finish_reason or ""
        self._totals[at] = self._totals.get(at, 0.0) + sum(part.output.logprobs)
        self._counts[at] = self._counts.get(at, 0) + len(part.output.token_ids)
        self._prompt_tokens = len(part.prompt)
        self._version = str(part.model.version)

    def response(self, is_last: bool) -> pb.ModelInferResponse:
        """What has come since the last one."""
        wanted, response = self._wanted, self._empty()
        lead = "" if "exclude_input_in_output" in wanted.flags else wanted.text
        order = sorted(self._texts)
        add_output(response, "text_output", "BYTES", [lead + self._texts[at] for at in order])
        if "return_finish_reason" in wanted.flags:
            add_output(response, "finish_reason", "BYTES", [self._reasons[at] for at in order])
        if "return_cumulative_logprob" in wanted.flags:
            totals = [self._totals[at] for at in order]
            add_output(response, "cumulative_logprob", "FP32", totals)
        if "return_num_input_tokens" in wanted.flags:
            add_output(response, "num_input_tokens", "UINT32", [self._prompt_tokens])
        if "return_num_output_tokens" in wanted.flags:
            add_output(response, "num_output_tokens", "UINT32", [self._counts[at] for at in order])
        names = {output.name for output in self._request.outputs}
        if names:
            _keep(response, names)
        final = is_last and not wanted.empty_final
        response.parameters["triton_final_response"].bool_param = final
        self._texts = dict.fromkeys(self._texts, "")
        self._counts = dict.fromkeys(self._counts, 0)
        return response

    def empty(self) -> pb.ModelInferResponse:
        """The end of a stream that wants one."""
        response = self._empty()
        response.parameters["triton_final_response"].bool_param = True
        return response

    def _empty(self) -> pb.ModelInferResponse:
        request = self._request
        return pb.ModelInferResponse(
            model_name=request.model_name, model_version=self._version, id=request.id
        )


def _keep(response: pb.ModelInferResponse, names: set[str]) -> None:
    """Leaves the outputs that were asked for by name.

    Raises:
      RequestError: there is no such one.
    """
    there = [output.name for output in response.outputs]
    missing = names - set(there)
    if missing:
        raise invalid(f"outputs.{min(missing)[:40]}: is not there; {', '.join(there)} are")
    kept = [at for at, name in enumerate(there) if name in names]
    outputs = [response.outputs[at] for at in kept]
    data = [response.raw_output_contents[at] for at in kept]
    del response.outputs[:], response.raw_output_contents[:]
    response.outputs.extend(outputs)
    response.raw_output_contents.extend(data)
