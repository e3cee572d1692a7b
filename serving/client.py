"""Python clients: `Client` for scripts, `AsyncClient` for many streams at once.

with Client("127.0.0.1:8470") as client:
    print(client.generate("base", "Once upon a time", max_tokens=20).text)
    for chunk in client.stream("base", "Once upon a time", stop=["."]):
        print(chunk.text, end="")
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.client_tls import TLS, client_credentials
from serving.resuming import ResumableCall
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.values import (
    Chunk,
    ClientError,
    Message,
    Model,
    Sampling,
    to_chat,
    to_chunk,
    to_load,
    to_model,
    to_request,
)

# Answers have no limit of their own; a long one with logprobs passes grpc's 4 MB.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# Seconds that a call waits for a server that ended to come back.
RESUME_SECONDS = 30.0


class Client:
    """A connection to one server. Thread-safe; close it, or use it as a context.

    Every method raises ClientError with the server's status and words, and ValueError for a value
    that fits no request. `timeout` is in seconds; the server stops work when it has passed.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        key: str | None = None,
        tls: bool | TLS = False,
        resume_seconds: float = RESUME_SECONDS,
    ):
        """`target` is "host:port"; `timeout` holds for calls that name none; `key` is the API key
        that a server with tenants asks for, which travels in the clear without `tls`: True trusts the
        authorities that the system does, a `TLS` names others, and the client's own certificate.
        When the server ends, calls wait up to `resume_seconds` for it to come back: streams go on after
        the tokens they have, others are asked anew (those of several samples fail)."""
        self._timeout, self._resume_seconds = timeout, resume_seconds
        self._reached = self._closed = False
        self._metadata = _metadata(key)
        if tls:
            self._channel = grpc.secure_channel(target, client_credentials(tls), _OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, _OPTIONS)
        self._inference = jblock_pb2_grpc.InferenceStub(self._channel)
        self._models = jblock_pb2_grpc.ModelsStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; streams still open are cancelled."""
        self._closed = True
        self._channel.close()

    def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Chunk:
        """The whole answer to a text, or to token ids."""
        request = to_request(model, prompt, sampling)
        return self._generate(request, timeout)

    def stream(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[Chunk]:
        """The answer as it comes. Closing the iterator cancels the request."""
        request = to_request(model, prompt, sampling)
        return self._stream(request, timeout)

    def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        tool_choice: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Chunk:
        """What an instruct model says next; a text is what its user says. Messages are mappings of
        role and content. Without max_tokens it may go on to the model's length. `tool_choice` is
        "auto", "none", "required", or the name of the tool that is called."""
        chat = to_chat(messages, tools, continue_final_message, template_variables, tool_choice)
        request = to_request(model, chat, sampling)
        return self._generate(request, timeout)

    def chat_stream(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        tool_choice: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[Chunk]:
        """The same as it comes. Closing the iterator cancels the request."""
        chat = to_chat(messages, tools, continue_final_message, template_variables, tool_choice)
        request = to_request(model, chat, sampling)
        return self._stream(request, timeout)

    def models(self) -> tuple[Model, ...]:
        """All served models, by name."""
        with _translated():
            answer = self._models.List(pb.ListModelsRequest(), **self._options())
        self._reached = True
        return tuple(to_model(m) for m in answer.models)

    def model(self, name: str) -> Model:
        """One served model."""
        with _translated():
            answer = self._models.Get(pb.GetModelRequest(name=name), **self._options())
        self._reached = True
        return to_model(answer)

    def load(self, name: str, version: int = 0) -> Model:
        """Has the server serve a model of its zoo too, or another version of one; 0 is the live one.
        Takes as long as compiling does. Requests in flight are not touched."""
        request = to_load(name, version)
        with _translated():
            return to_model(self._models.Load(request, **self._options()))

    def unload(self, name: str) -> None:
        """Has the server take no more requests for a model."""
        with _translated():
            self._models.Unload(pb.UnloadModelRequest(name=name), **self._options())

    def health(self) -> str:
        """ "SERVING" or "NOT_SERVING"."""
        with _translated():
            answer = self._health.Check(health_pb2.HealthCheckRequest(), **self._options())
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def _options(self, timeout: float | None = None) -> dict[str, Any]:
        limit = self._timeout if timeout is None else timeout
        return {"timeout": limit, "metadata": self._metadata}

    def _generate(self, request: pb.GenerateRequest, timeout: float | None) -> Chunk:
        call = self._resumable(request, timeout)
        while True:
            try:
                with _translated():
                    answer = self._inference.Generate(call.request, **self._options(call.timeout))
                self._reached = True
                return to_chunk(answer)
            except ClientError as error:
                time.sleep(self._wait(call, error))

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        call = self._resumable(request, timeout)
        while True:
            stream = self._inference.GenerateStream(call.request, **self._options(call.timeout))
            try:
                with _translated():
                    for message in stream:
                        self._reached = True
                        yield call.take(to_chunk(message))
                return
            except ClientError as error:
                time.sleep(self._wait(call, error))
            finally:
                stream.cancel()

    def _wait(self, call: ResumableCall, error: ClientError) -> float:
        """Seconds until a call that ended so may be tried again."""
        if self._closed:
            raise error
        return call.wait_after(error, self._reached)

    def _resumable(self, request: pb.GenerateRequest, timeout: float | None) -> ResumableCall:
        limit = self._timeout if timeout is None else timeout
        return ResumableCall(request, self._resume_seconds, limit)


class AsyncClient:
    """The same for asyncio; make it within the loop that uses it."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        key: str | None = None,
        tls: bool | TLS = False,
        resume_seconds: float = RESUME_SECONDS,
    ):
        """As `Client`."""
        self._timeout, self._resume_seconds = timeout, resume_seconds
        self._reached = False
        self._metadata = _metadata(key)
        if tls:
            self._channel = grpc.aio.secure_channel(target, client_credentials(tls), _OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, _OPTIONS)
        self._inference = jblock_pb2_grpc.InferenceStub(self._channel)
        self._models = jblock_pb2_grpc.ModelsStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; streams still open are cancelled."""
        await self._channel.close()

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Chunk:
        """The whole answer to a text, or to token ids."""
        request = to_request(model, prompt, sampling)
        return await self._generate(request, timeout)

    async def stream(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncIterator[Chunk]:
        """The answer as it comes. Closing the iterator (`aclose`) cancels the request."""
        request = to_request(model, prompt, sampling)
        async for chunk in self._stream(request, timeout):
            yield chunk

    async def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        tool_choice: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Chunk:
        """As `Client.chat`."""
        chat = to_chat(messages, tools, continue_final_message, template_variables, tool_choice)
        request = to_request(model, chat, sampling)
        return await self._generate(request, timeout)

    async def chat_stream(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        tool_choice: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncIterator[Chunk]:
        """As `Client.chat_stream`."""
        chat = to_chat(messages, tools, continue_final_message, template_variables, tool_choice)
        request = to_request(model, chat, sampling)
        async for chunk in self._stream(request, timeout):
            yield chunk

    async def models(self) -> tuple[Model, ...]:
        """All served models, by name."""
        with _translated():
            answer = await self._models.List(pb.ListModelsRequest(), **self._options())
        self._reached = True
        return tuple(to_model(m) for m in answer.models)

    async def model(self, name: str) -> Model:
        """One served model."""
        with _translated():
            request = pb.GetModelRequest(name=name)
            answer = await self._models.Get(request, **self._options())
        self._reached = True
        return to_model(answer)

    async def load(self, name: str, version: int = 0) -> Model:
        """As `Client.load`."""
        request = to_load(name, version)
        with _translated():
            return to_model(await self._models.Load(request, **self._options()))

    async def unload(self, name: str) -> None:
        """As `Client.unload`."""
        with _translated():
            await self._models.Unload(pb.UnloadModelRequest(name=name), **self._options())

    async def health(self) -> str:
        """ "SERVING" or "NOT_SERVING"."""
        with _translated():
            request = health_pb2.HealthCheckRequest()
            answer = await self._health.Check(request, **self._options())
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def _options(self, timeout: float | None = None) -> dict[str, Any]:
        limit = self._timeout if timeout is None else timeout
        return {"timeout": limit, "metadata": self._metadata}

    async def _generate(self, request: pb.GenerateRequest, timeout: float | None) -> Chunk:
        call = self._resumable(request, timeout)
        while True:
            try:
                with _translated():
                    options = self._options(call.timeout)
                    answer = await self._inference.Generate(call.request, **options)
                self._reached = True
                return to_chunk(answer)
            except ClientError as error:
                await asyncio.sleep(call.wait_after(error, self._reached))

    async def _stream(
        self, request: pb.GenerateRequest, timeout: float | None
    ) -> AsyncIterator[Chunk]:
        call = self._resumable(request, timeout)
        while True:
            stream = self._inference.GenerateStream(call.request, **self._options(call.timeout))
            try:
                with _translated():
                    async for message in stream:
                        self._reached = True
                        yield call.take(to_chunk(message))
                return
            except ClientError as error:
                await asyncio.sleep(call.wait_after(error, self._reached))
            finally:
                stream.cancel()

    def _resumable(self, request: pb.GenerateRequest, timeout: float | None) -> ResumableCall:
        limit = self._timeout if timeout is None else timeout
        return ResumableCall(request, self._resume_seconds, limit)


def _metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """The key as a server with tenants wants it."""
    if key is None:
        return ()
    if not key or not all("!" <= c <= "~" for c in key):  # Never show it: it may be almost right.
        raise ValueError("key: is empty, or has a space or another character that no header holds")
    return (("authorization", f"Bearer {key}"),)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """A stub's error as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise ClientError.of(error) from error
