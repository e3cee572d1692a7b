"""Changes of what is served, while it is served: models are loaded, swapped and unloaded."""

import asyncio
from collections.abc import Mapping

import grpc
from absl import logging

from jblock.engine import api
from serving.dispatcher import Dispatcher, load_models
from serving.errors import RequestError, invalid, unavailable
from serving.validation import ServedModel


class Changes:
    """Has the engine serve other chains, one change after the other.

    The dispatcher's models, tokenizers included, are replaced in one assignment once the engine has
    switched; a request that was prepared before and arrives after is prepared anew (`settled`).
    """

    def __init__(self, dispatcher: Dispatcher):
        self._dispatcher = dispatcher
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()

    async def settled(self) -> None:
        """Waits until no change is under way."""
        async with self._lock:
            pass

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
        return self._dispatcher.models[name]

    async def unload(self, name: str) -> None:
        """Serves a model no more.

        Raises:
          RequestError: it is not served, it is the last one, or the engine is not there.
        """
        self._dispatcher.find("name", name)
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
        async with self._lock:
            dispatcher = self._dispatcher
            dispatcher.check_up()
            now = {name: _pinned(model) for name, model in dispatcher.models.items()}
            wanted = {n: w for n, w in (now | change).items() if w is not None}
            if not wanted:
                raise RequestError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"name: {next(iter(change))!r} is the last model served; load another first",
                )
            dispatcher.models = await asyncio.to_thread(
                _serve, dispatcher.engine, tuple(wanted.values()), dispatcher.models
            )
            logging.info("serving %s", ", ".join(wanted.values()))


def _pinned(model: ServedModel) -> str:
    return f"{model.info.name}@{model.info.version}"


def _serve(
    engine: api.Engine, wanted: tuple[str, ...], now: Mapping[str, ServedModel]
) -> dict[str, ServedModel]:
    """Switches the engine and reads the tokenizers; goes back where one cannot be read."""
    try:
        infos = engine.serve(wanted)
        try:
            return load_models(infos, now.values())
        except ValueError:
            engine.serve([_pinned(model) for model in now.values()])
            raise
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
