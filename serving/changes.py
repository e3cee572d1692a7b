"""Changes of what is served, while it is served: models are loaded, swapped and unloaded."""

import asyncio
import concurrent.futures
import time
from collections.abc import Sequence

import grpc
from absl import logging

from jblock.engine import api
from serving.dispatcher import Dispatcher
from serving.errors import RequestError, invalid, unavailable
from serving.served_models import ServedModel, load_models
from serving.tenants import ANONYMOUS

# How long a request whose model was swapped waits for the server to know the new one.
_ADOPT_SECONDS = 10.0
_LOOK_SECONDS = 0.05


class Changes:
    """Has the engine serve other chains. Changes do not wait for each other: one whose storage hangs holds up
    no other, and the engine puts together those that meet.

    The dispatcher's models, tokenizers included, are replaced in one assignment once the engine has
    switched; a request that was prepared before and arrives after is prepared anew (`replaced`).
    """

    def __init__(self, dispatcher: Dispatcher):
        self._dispatcher = dispatcher
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()
        # Of its own: changes that hang must not take the threads that encode prompts.
        self._pool = concurrent.futures.ThreadPoolExecutor(64, "jblock-change")

    async def replaced(self, model: ServedModel | None) -> None:
        """Waits until a model that the engine serves no more in this version is no longer served here either,
        for a while."""
        end = time.monotonic() + _ADOPT_SECONDS
        while model is not None and time.monotonic() < end:
            if self._dispatcher.models.get(model.info.name) is not model:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def load(self, name: str, version: int) -> ServedModel:
        """Serves a model of the zoo too, in this version; 0 is the live one.

        Raises:
          RequestError: the zoo does not have it, it does not fit, or the engine is not there.
        """
        if not name:
            raise invalid("name: is empty; name a model of the zoo")
        if "@" in name:
            raise invalid(f"name: {name[:80]!r} has an '@'; put the number into version")
        if version < 0:
            raise invalid(f"version: {version} is below 0; 0 is the live one")
        await self._run({name: f"{name}@{version}" if version else name})
        return self._dispatcher.find("name", name, ANONYMOUS)

    async def unload(self, name: str) -> None:
        """Serves a model no more.

        Raises:
          RequestError: it is not served, it is the last one, or the engine is not there.
        """
        self._dispatcher.find("name", name, ANONYMOUS)
        await self._run({name: None})

    async def _run(self, change: dict[str, str | None]) -> None:
        """Makes a change to its end, even where its client leaves: half of one helps nobody."""
        task = asyncio.create_task(self._change(change))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    def _forget(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Whoever asked may have left; asyncio is not to log it.

    async def _change(self, change: dict[str, str | None]) -> None:
        """Serves each model as `change` says, and all others in the version they have now."""
        dispatcher = self._dispatcher
        dispatcher.check_up()
        now = {name: _pinned(model) for name, model in dispatcher.models.items()}
        wanted = {n: w for n, w in (now | change).items() if w is not None}
        if not wanted:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"name: {next(iter(change))!r} is the last model served; load another first",
            )
        loop, names = asyncio.get_running_loop(), tuple(wanted.values())
        base = tuple(now.values())
        await loop.run_in_executor(self._pool, _serve, dispatcher.engine, names, base)
        async with self._lock:
            try:
                dispatcher.models = await asyncio.to_thread(_adopt, dispatcher)
            except ValueError as error:
                back = [_pinned(model) for model in dispatcher.models.values()]
                await asyncio.to_thread(_serve, dispatcher.engine, back)
                raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f"name: {error}") from error
        logging.info("serving %s", ", ".join(map(_pinned, dispatcher.models.values())))


def _adopt(dispatcher: Dispatcher) -> dict[str, ServedModel]:
    """What the engine serves now. It may have made another change since the one that asks."""
    return load_models(dispatcher.engine.models(), dispatcher.models.values())


def _pinned(model: ServedModel) -> str:
    return f"{model.info.name}@{model.info.version}"


def _serve(engine: api.Engine, wanted: Sequence[str], base: Sequence[str] | None = None) -> None:
    """Switches the engine; its errors become statuses."""
    try:
        engine.serve(wanted, base)
    except api.UnknownChain as error:
        raise RequestError(grpc.StatusCode.NOT_FOUND, f"name: {error}") from error
    except ValueError as error:
        raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f"name: {error}") from error
    except api.EngineDied as error:
        raise unavailable(f"engine: {error}; try again") from error
    except Exception as error:
        logging.exception("serving %s failed", ", ".join(wanted))
        raise RequestError(
            grpc.StatusCode.INTERNAL, "server: failed to change what is served; its log says how"
        ) from error
