"""The `Models` service: what is served, and how to change it."""

import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from serving.authentication import caller
from serving.changes import Changes
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, abort, unavailable
from serving.served_models import ServedModel
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc

T = TypeVar("T")


class Models(jblock_pb2_grpc.ModelsServicer):
    """What is served."""

    def __init__(self, dispatcher: Dispatcher, changes: Changes):
        self._dispatcher, self._changes = dispatcher, changes

    async def List(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """All models that the tenant may use, by name."""
        if not self._dispatcher.ready.is_set():
            await abort(
                context, unavailable("engine: is warming up; try again when health is SERVING")
            )
        models = self._dispatcher.models_of(caller())
        return pb.ListModelsResponse(models=[_model(m) for m in models])

    async def Get(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        """One model."""
        try:
            return _model(self._dispatcher.find("name", request.name, caller()))
        except RequestError as error:
            await abort(context, error)
            raise

    async def Load(
        self, request: pb.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.Model:
        """Serves a model of the zoo too, or its live version from now on."""
        load = functools.partial(self._changes.load, request.name, request.version)
        return _model(await self._as_admin(load, context))

    async def Unload(
        self, request: pb.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadModelResponse:
        """Takes no more requests for a model."""
        await self._as_admin(functools.partial(self._changes.unload, request.name), context)
        return pb.UnloadModelResponse()

    async def _as_admin(
        self, change: Callable[[], Awaitable[T]], context: grpc.aio.ServicerContext
    ) -> T:
        """What the change returns, if the tenant may make it; a refusal becomes a status."""
        try:
            tenant = caller()
            if not tenant.admin:
                raise RequestError(
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"tenant {tenant.name} may not change what is served; "
                    "its entry in --auth_file needs admin = true",
                )
            return await change()
        except RequestError as error:
            await abort(context, error)
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
        has_chat_template=model.template is not None,
    )
