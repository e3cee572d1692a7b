"""Python clients: `Client` for scripts, `AsyncClient` for many streams at once.

with Client("127.0.0.1:8470") as client:
    print(client.generate("base", "Once upon a time", max_tokens=20).text)
    for chunk in client.stream("base", "Once upon a time", stop=["."]):
        print(chunk.text, end="")
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.values import (
    Chunk,
    ClientError,
    Model,
    Sampling,
    to_chunk,
    to_model,
    to_request,
)

# Answers have no limit of their own; a long one with logprobs passes grpc's 4 MB.
_OPTIONS = (("grpc.max_receive_message_length", -1),)


class Client:
    """A connection to one server. Thread-safe; close it, or use it as a context.

    Every method raises ClientError with the server's status and words, and ValueError for a value
    that fits no request. `timeout` is in seconds; the server stops work when it has passed.
    """

    def __init__(self, target: str, *, timeout: float | None = None):
        """`target` is "host:port"; `timeout` holds for calls that name none."""
        self._timeout = timeout
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
        with _translated():
            return to_chunk(self._inference.Generate(request, timeout=self._limit(timeout)))

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
        return self._stream(request, self._limit(timeout))

    def models(self) -> tuple[Model, ...]:
        """All served models, by name."""
        with _translated():
            answer = self._models.List(pb.ListModelsRequest(), timeout=self._timeout)
        return tuple(to_model(m) for m in answer.models)

    def model(self, name: str) -> Model:
        """One served model."""
        with _translated():
            return to_model(self._models.Get(pb.GetModelRequest(name=name), timeout=self._timeout))

    def health(self) -> str:
        """ "SERVING" or "NOT_SERVING"."""
        with _translated():
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def _limit(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        call = self._inference.GenerateStream(request, timeout=timeout)
        try:
            with _translated():
                for message in call:
                    yield to_chunk(message)
        finally:
            call.cancel()


class AsyncClient:
    """The same for asyncio; make it within the loop that uses it."""

    def __init__(self, target: str, *, timeout: float | None = None):
        """`target` is "host:port"; `timeout` holds for calls that name none."""
        self._timeout = timeout
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
        with _translated():
            return to_chunk(await self._inference.Generate(request, timeout=self._limit(timeout)))

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
        call = self._inference.GenerateStream(request, timeout=self._limit(timeout))
        try:
            with _translated():
                async for message in call:
                    yield to_chunk(message)
        finally:
            call.cancel()

    async def models(self) -> tuple[Model, ...]:
        """All served models, by name."""
        with _translated():
            answer = await self._models.List(pb.ListModelsRequest(), timeout=self._timeout)
        return tuple(to_model(m) for m in answer.models)

    async def model(self, name: str) -> Model:
        """One served model."""
        with _translated():
            request = pb.GetModelRequest(name=name)
            return to_model(await self._models.Get(request, timeout=self._timeout))

    async def health(self) -> str:
        """ "SERVING" or "NOT_SERVING"."""
        with _translated():
            request = health_pb2.HealthCheckRequest()
            answer = await self._health.Check(request, timeout=self._timeout)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def _limit(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """A stub's error as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise ClientError.of(error) from error
