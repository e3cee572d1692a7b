"""The `Inference` service: calls over gRPC."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import grpc
from absl import logging

from serving import tokenizing
from serving.answers import Part, Sink
from serving.authentication import caller
from serving.chat.messages import conversation_of
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, abort, invalid
from serving.generation import NO_LIMIT, Ask, Generator
from serving.grpc_call import Writer, grpc_call
from serving.messages import collect, to_embedding, to_score
from serving.structured.forced_calls import forced_calls
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc

# A client whose deadline has passed cancels the call, by a clock that began before the call was here: what
# ends so shortly before our own end of it has expired, too.
_CLOCKS_APART_S = 0.25


class Inference(jblock_pb2_grpc.InferenceServicer):
    """Generation, and what goes with it."""

    def __init__(self, dispatcher: Dispatcher, generator: Generator):
        self._dispatcher, self._generator = dispatcher, generator

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
        writer = Writer(context)
        async with self._answering(request, context, sink=writer) as parts:
            try:
                async for part in parts:
                    await writer.write(part)
            except Exception:
                await writer.written()  # A status may not overtake it.
                raise

    @contextlib.asynccontextmanager
    async def _answering(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        pooling: str = "",
        sink: Sink | None = None,
    ) -> AsyncIterator[AsyncIterator[Part]]:
        """The parts of the answer that the sink does not take; whatever ends it becomes a status and a
        count."""
        refusal: RequestError | None = None
        code = grpc.StatusCode.OK
        call = grpc_call("grpc", context)
        try:
            ask = ask_of(request, context.time_remaining())
            ask = dataclasses.replace(ask, pooling=pooling)
            generation = self._generator.parts([ask], call, sink=sink)
            async with contextlib.aclosing(generation) as parts:
                yield parts
        except RequestError as error:
            code, refusal = error.code, error
        except asyncio.CancelledError:
            left = context.time_remaining()
            expired = left is not None and left <= _CLOCKS_APART_S
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            refusal = RequestError(code, "server: failed on this request; its log says how")
            logging.exception("answering a request failed")
        finally:
            self._generator.ended(call, request.model, code, refusal)
        if refusal is not None:
            await abort(context, refusal)  # Last, so that who sees the status is counted.

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        """The log-probabilities of a text: of the prompt of a generation whose one token is not shown."""
        generate = pb.GenerateRequest(
            model=request.model, policy=request.policy, max_tokens=1, prompt_logprobs=True
        )
        _copy_prompt(request, generate)
        response = pb.ScoreResponse()
        async with self._answering(generate, context) as parts:
            async for part in parts:
                response = to_score(part)
        return response

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        """The last hidden state of a prompt, pooled."""
        generate = pb.GenerateRequest(model=request.model, policy=request.policy, max_tokens=1)
        _copy_prompt(request, generate)
        response = pb.EmbedResponse()
        pooling = "mean" if request.pooling == pb.POOLING_MEAN else "last"
        async with self._answering(generate, context, pooling) as parts:
            async for part in parts:
                response = to_embedding(part, scaled=not request.as_computed)
        return response

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """The ids of a text or a chat."""
        async with _refusing(context):
            model = self._dispatcher.find("model", request.model, caller())
            if request.HasField("chat"):
                ids = await self._generator.chat_ids(model, conversation_of(request.chat))
            else:
                special = not request.no_special_tokens
                ids = await tokenizing.encode("text", model, request.text, special)
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        """The text of ids."""
        async with _refusing(context):
            model = self._dispatcher.find("model", request.model, caller())
            special = not request.skip_special_tokens
            text = tokenizing.decode("token_ids", model, request.token_ids, special)
        return pb.DetokenizeResponse(text=text)


def _copy_prompt(request: pb.ScoreRequest | pb.EmbedRequest, generate: pb.GenerateRequest) -> None:
    match request.WhichOneof("prompt"):
        case "text":
            generate.text = request.text
        case "token_ids":
            generate.token_ids.CopyFrom(request.token_ids)
        case "chat":
            generate.chat.CopyFrom(request.chat)


def ask_of(request: pb.GenerateRequest, deadline: float | None = None) -> Ask:
    """What the generator is asked. A chat without a limit goes on to the model's length."""
    if not request.HasField("chat"):
        return Ask(request=request, deadline=deadline)
    conversation = conversation_of(request.chat)
    choice, forced = request.chat.tool_choice, False
    if choice == "none":
        conversation = dataclasses.replace(conversation, tools=None)
    elif choice not in ("", "auto"):
        if request.HasField("structured_output"):
            raise invalid("structured_output: cannot go with a call that chat.tool_choice demands")
        name = None if choice == "required" else choice
        wanted = forced_calls(conversation.tools, name, "chat.tool_choice")
        request.structured_output.CopyFrom(wanted)
        forced = True
    return Ask(
        request=request,
        conversation=conversation,
        grammar_field="chat.tool_choice" if forced else "structured_output",
        forced_call=forced,
        default_max_tokens=NO_LIMIT,
        deadline=deadline,
    )


@contextlib.asynccontextmanager
async def _refusing(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Refusals become statuses."""
    try:
        yield
    except RequestError as error:
        await abort(context, error)
