"""Between the engine and the event loop: admission, and the outputs of each request.

One thread waits on the engine; it hands what a poll brought to the event loop in one call. Outputs
of a request that its client has not yet taken are merged, so a slow client costs no more memory
than its answer.
"""

import asyncio
import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import grpc
from absl import logging

from jblock.engine import api
from serving import errors
from serving.tenants import ANONYMOUS, Tenant
from serving.text import TextCodec
from serving.validation import ServedModel

# Seconds the reader waits for outputs before it looks whether it is to end.
_POLL_SECONDS = 0.2
# Outputs that a client has not yet taken are merged once there are so many.
_MOST_APART = 64


class Dispatcher:
    """Owns an engine on behalf of one event loop. Everything but `_read` runs in that loop.

    Attributes:
      models: what is served, by name; empty until the engine is warm.
      ready: set once the engine is warm.
      up: whether the engine computes now; False while a process that died is replaced. Requests are taken
        all the same, and wait.
      changed: set when `up` changed.
      dead: set once the engine can serve no more; `failure` says why.
      failure: an exception of the engine, ValueError when it refused its configuration.
    """

    def __init__(self, engine: api.Engine, max_queue: int):
        """Takes the engine over; `start` begins to read it."""
        self.engine = engine
        self.models: Mapping[str, ServedModel] = {}
        self.ready = asyncio.Event()
        self.dead = asyncio.Event()
        self.up = False
        self.changed = asyncio.Event()
        self.failure: Exception | None = None
        self._max_queue = max_queue
        self._open: dict[str, Ticket] = {}
        self._open_by_tenant: collections.Counter[str] = collections.Counter()
        self._held: set[str] = set()  # Ids whose handler has not yet sent all.
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._read, name="engine-reader", daemon=True)

    @property
    def num_open(self) -> int:
        """Requests admitted whose pages the engine has not yet given back."""
        return len(self._open)

    def start(self) -> None:
        """Begins to read the engine; `ready` or `dead` follows."""
        self._thread.start()

    def check_up(self) -> None:
        """Nothing, while requests can be served.

        Raises:
          RequestError: the engine is not there, or the server is shutting down.
        """
        if self.dead.is_set():
            raise errors.unavailable(f"engine: {self.failure}; restart the server")
        if self._draining:
            raise errors.unavailable("server: is shutting down; send the request to another one")
        if not self.ready.is_set():
            raise errors.unavailable("engine: is warming up; try again when health is SERVING")

    def find(self, field: str, name: str) -> ServedModel:
        """The model of this name, which came in this field.

        Raises:
          RequestError: there is none, or the engine is not there.
        """
        if not name:
            raise errors.invalid(f"{field}: is empty; name a model, Models.List lists them")
        if not self.ready.is_set():
            raise errors.unavailable("engine: is warming up; try again when health is SERVING")
        model = self.models.get(name)
        if model is None:
            names = ", ".join(sorted(self.models)[:8])
            more = ", ..." if len(self.models) > 8 else ""
            raise errors.RequestError(
                grpc.StatusCode.NOT_FOUND,
                f"{field}: {name[:80]!r} is not served; choose one of {names}{more}",
            )
        return model

    def admit(self, arrived: asyncio.Event, tenant: Tenant = ANONYMOUS) -> "Ticket":
        """A place for one request; use it as a context. `arrived` is set when something came for it.

        Raises:
          RequestError: the engine is not there, or all places, or all of this tenant's, are taken.
        """
        self.check_up()
        most = tenant.max_requests or (self._max_queue + 1) // 2
        if self._open_by_tenant[tenant.name] >= most:
            raise errors.RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"max_requests: tenant {tenant.name} has {most} requests open, which is all it may "
                "have; wait for one to end",
            )
        if len(self._open) >= self._max_queue:
            raise errors.RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"queue: {len(self._open)} requests are open, which is all this server admits; "
                "try again later, or raise --max_queue",
            )
        ticket = Ticket(self, str(next(self._numbers)), tenant, arrived)
        self._open[ticket.request_id] = ticket
        self._open_by_tenant[tenant.name] += 1
        self._held.add(ticket.request_id)
        self._idle.clear()
        return ticket

    async def drain(self, seconds: float) -> bool:
        """Admits nothing more; whether all open requests ended within `seconds`."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends the reader and the engine. Requests still open fail."""
        self._stop.set()
        self.engine.close()
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_SECONDS)
        self._die(api.EngineDied("the server is shutting down"))

    def release(self, ticket: "Ticket") -> None:
        """Frees a place: the engine has ended the request, or never had it."""
        if self._open.pop(ticket.request_id, None) is not None:
            self._open_by_tenant[ticket.tenant.name] -= 1
        self._settle()

    def leave(self, ticket: "Ticket") -> None:
        """The handler has sent all it will."""
        self._held.discard(ticket.request_id)
        self._settle()

    def _settle(self) -> None:
        if not self._open and not self._held:
            self._idle.set()

    def _read(self) -> None:
        """The reader thread."""
        try:
            models = load_models(self.engine.models())
            self._call(self._become_ready, models)
            up = True
            while not self._stop.is_set():
                outputs = self.engine.poll(_POLL_SECONDS)
                if outputs:
                    self._call(self._deliver, outputs)
                if self.engine.is_up is not up:
                    up = not up
                    self._call(self._turn, up)
        except Exception as error:
            if not isinstance(error, ValueError | api.EngineDied):
                logging.exception("reading the engine failed")
            self._call(self._die, error)

    def _call(self, function: Callable, *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._stop.set()  # The loop is closed; nobody is left to tell.

    def _become_ready(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models
        self.ready.set()
        self._turn(True)

    def _turn(self, up: bool) -> None:
        self.up = up
        self.changed.set()

    def _deliver(self, outputs: list[api.Output]) -> None:
        for output in outputs:
            ticket = self._open.get(output.request_id)
            if ticket is None:
                continue
            ticket.put(output)
            if output.finish_reason is not None:
                self.release(ticket)

    def _die(self, error: Exception) -> None:
        if self.dead.is_set():
            return
        self.failure = error
        self.dead.set()
        self._turn(False)
        for ticket in list(self._open.values()):
            ticket.fail(errors.unavailable(f"engine: {error}; try again elsewhere"))
            self.release(ticket)


class Ticket:
    """One admitted request. Leaving its context cancels it in the engine unless it has ended."""

    def __init__(
        self, dispatcher: Dispatcher, request_id: str, tenant: Tenant, arrived: asyncio.Event
    ):
        self.request_id, self.tenant = request_id, tenant
        self._dispatcher = dispatcher
        self._submitted = False
        self._ended = False
        self._error: errors.RequestError | None = None
        self._arrived = arrived
        self._outputs: list[api.Output] = []

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._submitted:
            self._dispatcher.release(self)
        elif not self._ended:
            # The place stays taken until the engine confirms, or a client that opens and cancels
            # could queue without bound.
            self._dispatcher.engine.cancel(self.request_id)
        self._dispatcher.leave(self)

    def submit(self, request: api.Request) -> None:
        """Hands the request to the engine; its id must be this ticket's."""
        self._dispatcher.engine.submit(request)
        self._submitted = True

    def take(self) -> api.Output | None:
        """All that came since the last call, merged; the one with a finish_reason is the last. None: nothing
        came.

        Raises:
          RequestError: the engine failed the request, or died.
        """
        if self._error is not None:
            raise self._error
        if not self._outputs:
            return None
        last = self._outputs[-1]
        if last.finish_reason == "error":
            raise errors.from_engine(last.error_code, last.error_message)
        if last.finish_reason == "cancelled":
            raise errors.unavailable("engine: cancelled this request; try again")
        output = _merged(self._outputs)
        self._outputs.clear()
        return output

    def put(self, output: api.Output) -> None:
        """Takes what the engine brought."""
        self._outputs.append(output)
        if len(self._outputs) == _MOST_APART:
            self._outputs = [_merged(self._outputs)]
        if output.finish_reason is not None:
            self._ended = True
        self._arrived.set()

    def fail(self, error: errors.RequestError) -> None:
        """Ends the request with an error; the engine is gone."""
        self._error = error
        self._ended = True
        self._arrived.set()


def _merged(outputs: Sequence[api.Output]) -> api.Output:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return dataclasses.replace(
        outputs[-1],
        token_ids=tuple(i for o in outputs for i in o.token_ids),
        logprobs=tuple(p for o in outputs for p in o.logprobs),
        top_logprobs=tuple(t for o in outputs for t in o.top_logprobs),
        prompt_logprobs=tuple(p for o in outputs for p in o.prompt_logprobs),
    )


def load_models(
    infos: tuple[api.ModelInfo, ...], before: Iterable[ServedModel] = ()
) -> dict[str, ServedModel]:
    """Reads the tokenizers; models that share one share it in memory too.

    Args:
      infos: what is served.
      before: models that were served; their tokenizers, which never change in a zoo, are used again.

    Raises:
      ValueError: a tokenizer cannot be read.
    """
    codecs = {m.info.tokenizer_path: m.codec for m in before if m.codec is not None}
    for path in {info.tokenizer_path for info in infos if info.tokenizer_path} - codecs.keys():
        codecs[path] = TextCodec.load(path)
    return {i.name: ServedModel(info=i, codec=codecs.get(i.tokenizer_path)) for i in infos}
