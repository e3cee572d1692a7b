"""Between the engine and the event loop: admission, and the outputs of each request.

One thread waits on the engine; it hands what a poll brought to the event loop in one call. Outputs
of a request that its client has not yet taken are merged, so a slow client costs no more memory
than its answer.
"""

import asyncio
import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import grpc
import msgspec
from absl import logging

from jblock.engine import api
from serving import errors
from serving.quotas import Quotas
from serving.served_models import ServedModel, load_models
from serving.tenants import ANONYMOUS, Tenant

# Seconds the reader waits for outputs before it looks whether it is to end.
_POLL_SECONDS = 0.2
# Outputs that a client has not yet taken are merged once there are so many.
_MOST_APART = 64
# Seconds that a drain waits for clients to read answers which are complete.
_UNREAD_SECONDS = 3.0


Direct = Callable[["Ticket", api.Output], bool]
"""Deals with what came for a ticket, if it can now; whether it did."""


class Arrivals(asyncio.Event):
    """Set when something came for one of a call's tickets.

    Attributes:
      direct: where somebody waits, is given what came before anything else is done with it; where that
        is dealt with, nobody is woken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direct: Direct | None = None

    def wake(self) -> None:
        """Something came that `direct` does not take."""
        self.direct = None
        self.set()


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
      quotas: what tenants have used of theirs.
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
        self.quotas = Quotas()
        self._max_queue = max_queue
        self._places: dict[str, Ticket] = {}
        self._places_by_tenant: collections.Counter[str] = collections.Counter()
        self._running: dict[str, Ticket] = {}  # Those of `_places` that the engine has not ended.
        self._settled = asyncio.Event()  # Set when a place, or the engine's part of it, is over.
        self._quiet_since = 0.0  # When the engine last ended a request, by the loop's clock.
        self._draining = False
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._read, name="engine-reader", daemon=True)

    @property
    def num_open(self) -> int:
        """Requests admitted and not over: the engine still has their pages, or their client has not yet
        taken all of the answer."""
        return len(self._places)

    @property
    def serves(self) -> bool:
        """Whether requests are taken and computed now."""
        return self.up and not self._draining

    def adapters(self) -> tuple[set[str], set[str]]:
        """Adapters with requests that the engine has brought something for, and those with others alone.
        Any thread may ask."""
        tickets = [t for t in list(self._running.values()) if t.adapter]
        running = {t.adapter for t in tickets if t.began}
        return running, {t.adapter for t in tickets} - running

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

    def models_of(self, tenant: Tenant) -> list[ServedModel]:
        """What a tenant may ask for, by name."""
        names = sorted(name for name in self.models if tenant.may_use(name))
        return [self.models[name] for name in names]

    def find(self, field: str, name: str, tenant: Tenant) -> ServedModel:
        """The model of this name, which came in this field. One that a tenant may not use is one that is
        not there.

        Raises:
          RequestError: there is none, or the engine is not there.
        """
        if not name:
            raise errors.invalid(f"{field}: is empty; name a model, Models.List lists them")
        if not self.ready.is_set():
            raise errors.unavailable("engine: is warming up; try again when health is SERVING")
        model = self.models.get(name)
        if model is None or not tenant.may_use(name):
            known = [m.info.name for m in self.models_of(tenant)]
            names = ", ".join(known[:8]) or "none"
            more = ", ..." if len(known) > 8 else ""
            raise errors.RequestError(
                grpc.StatusCode.NOT_FOUND,
                f"{field}: {name[:80]!r} is not served; choose one of {names}{more}",
            )
        return model

    def admit(
        self,
        arrived: Arrivals,
        tenant: Tenant = ANONYMOUS,
        count: int = 1,
        field: str = "n",
    ) -> list["Ticket"]:
        """Places for `count` requests that came together, all or none. `leave` ends each; use it as a context
        before that. `arrived` is set when something came for one of them.

        Raises:
          RequestError: the engine is not there; all places, or all of this tenant's, are taken; or so many
            places will never be there, which `field` asks for.
        """
        self.check_up()
        most = min(tenant.max_requests or (self._max_queue + 1) // 2, self._max_queue)
        if count > most:
            raise errors.invalid(
                f"{field}: asks for {count} answers at once, and at most {most} requests may be "
                f"open; ask for "
                "fewer, or have max_requests or --max_queue raised"
            )
        if self._places_by_tenant[tenant.name] + count > most and tenant is not ANONYMOUS:
            raise errors.exhausted(
                f"max_requests: tenant {tenant.name} has {self._places_by_tenant[tenant.name]} "
                f"requests open, "
                f"of {most} that it may have; wait for one to end",
                by_tenant=True,
            )
        self._make_room(tenant, count)
        tickets = [Ticket(self, str(next(self._numbers)), tenant, arrived) for _ in range(count)]
        for ticket in tickets:
            self._places[ticket.request_id] = self._running[ticket.request_id] = ticket
        self._places_by_tenant[tenant.name] += count
        return tickets

    def _make_room(self, tenant: Tenant, count: int) -> None:
        """Sees that so many places are free. Where all are taken, a tenant that has less than its share of
        them gets those of requests that nothing was generated for yet, the youngest of the tenants that are
        furthest above theirs.

        Raises:
          RequestError: UNAVAILABLE, they are not free.
        """
        held = {name: n for name, n in self._places_by_tenant.items() if n}
        missing = sum(held.values()) + count - self._max_queue
        if missing <= 0:
            return
        refusal = errors.unavailable(
            f"queue: {len(self._places)} requests are open, and this server admits {self._max_queue}; "
            "try again later, or raise --max_queue"
        )
        weights = {t.tenant.name: t.tenant.weight for t in self._places.values()}
        weights[tenant.name] = tenant.weight
        place = self._max_queue / sum(weights.values())
        mine = held.get(tenant.name, 0) + count
        # Those that were shed are on their way out; so are no more than there are places.
        if mine > place * tenant.weight or len(self._places) + count > 2 * self._max_queue:
            raise refusal
        waiting: dict[str, list[Ticket]] = {}
        for ticket in self._running.values():
            if not ticket.began:
                waiting.setdefault(ticket.tenant.name, []).append(ticket)
        victims = []
        for _ in range(missing):
            above = [n for n, w in weights.items() if waiting.get(n) and held[n] > place * w]
            if not above:
                raise refusal
            name = max(above, key=lambda n: held[n] / weights[n])
            victims.append(waiting[name].pop())
            held[name] -= 1
        for ticket in victims:
            self._places_by_tenant[ticket.tenant.name] -= 1
            ticket.shed()

    async def drain(self, seconds: float, hurry: asyncio.Event | None = None) -> int:
        """Admits nothing more, and waits for what is open: up to `seconds` for the engine, not much
        longer than that for clients which do not read, and no longer once `hurry` is set.

        Returns:
          How many requests were not over by then.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        begin = loop.time()
        hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        try:
            while self._places and not hurried.done():
                end = begin + seconds
                if not self._running:
                    end = min(end, max(begin, self._quiet_since) + _UNREAD_SECONDS)
                if loop.time() >= end:
                    break
                self._settled.clear()
                settled = asyncio.ensure_future(self._settled.wait())
                await asyncio.wait(
                    (settled, hurried), timeout=end - loop.time(), return_when="FIRST_COMPLETED"
                )
                settled.cancel()
        finally:
            hurried.cancel()
        return len(self._places)

    def cut(self) -> None:
        """Ends what is open, so that its clients learn why."""
        for ticket in list(self._running.values()):
            ticket.fail(
                errors.unavailable("server: shut down before this request ended; send it elsewhere")
            )

    async def left(self, seconds: float) -> None:
        """Waits until all clients were told how their requests ended, up to so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._places:
                    self._settled.clear()
                    await self._settled.wait()

    def close(self) -> None:
        """Ends the reader and the engine. Requests still open fail."""
        self._stop.set()
        self.engine.close()
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_SECONDS)
        self._die(api.EngineDied("the server is shutting down"))

    def ended(self, ticket: "Ticket") -> None:
        """The engine has ended the request, or never had it."""
        if self._running.pop(ticket.request_id, None) is not None:
            self._quiet_since = self._loop.time()
        self._free(ticket)

    def leave(self, ticket: "Ticket") -> None:
        """The client has taken all of its answer, or has gone."""
        ticket.left = True
        self._free(ticket)

    def _free(self, ticket: "Ticket") -> None:
        """Frees a place that neither the engine nor the client needs any more."""
        self._settled.set()
        over = ticket.left and ticket.request_id not in self._running
        if over and self._places.pop(ticket.request_id, None) is not None and not ticket.was_shed:
            self._places_by_tenant[ticket.tenant.name] -= 1

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
                if self.engine.take_news():
                    self._adopt_news()
                if self.engine.is_up is not up:
                    up = not up
                    self._call(self._turn, up)
        except Exception as error:
            if not isinstance(error, ValueError | api.EngineDied):
                logging.exception("reading the engine failed")
            self._call(self._die, error)

    def _adopt_news(self) -> None:
        """Serves what another front end had the engine serve; where a tokenizer cannot be read, what was
        served before."""
        try:
            models = load_models(self.engine.models(), self.models.values())
        except ValueError as error:
            logging.error("what another front end changed cannot be served here: %s", error)
            return
        self._call(self._adopt, models)

    def _call(self, function: Callable, *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._stop.set()  # The loop is closed; nobody is left to tell.

    def _become_ready(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models
        self.ready.set()
        self._turn(True)

    def _adopt(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models

    def _turn(self, up: bool) -> None:
        self.up = up
        self.changed.set()

    def _deliver(self, outputs: list[api.Output]) -> None:
        for output in outputs:
            ticket = self._running.get(output.request_id)
            if ticket is None:
                continue
            ticket.put(output)
            if output.finish_reason is not None:
                self.ended(ticket)

    def _die(self, error: Exception) -> None:
        if self.dead.is_set():
            return
        self.failure = error
        self.dead.set()
        self._turn(False)
        for ticket in list(self._running.values()):
            ticket.fail(errors.unavailable(f"engine: {error}; try again elsewhere"))
            self.ended(ticket)


class Ticket:
    """One admitted request. Leaving its context cancels it in the engine unless it has ended; its
    place is free once `Dispatcher.leave` was called too.

    Attributes:
      left: its client has taken all, or has gone.
      began: the engine has brought something for it.
      was_shed: its place was given to another tenant.
      ended: nothing more comes from the engine.
      adapter: the model that it asks, where that is an adapter; else "".
    """

    def __init__(self, dispatcher: Dispatcher, request_id: str, tenant: Tenant, arrived: Arrivals):
        self.request_id, self.tenant, self.adapter = request_id, tenant, ""
        self.left = self.began = self.was_shed = False
        self._dispatcher = dispatcher
        self._submitted = False
        self.ended = False
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
            self._dispatcher.ended(self)
        elif not self.ended:
            # The place stays taken until the engine confirms, or a client that opens and cancels
            # could queue without bound.
            self._dispatcher.engine.cancel(self.request_id)

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
        self.began = True
        if output.finish_reason is not None:
            self.ended = True
        elif (direct := self._arrived.direct) is not None and direct(self, output):
            return
        self._outputs.append(output)
        if len(self._outputs) == _MOST_APART:
            self._outputs = [_merged(self._outputs)]
        self._arrived.wake()

    def fail(self, error: errors.RequestError) -> None:
        """Ends the request with an error; the engine is gone."""
        self._error = error
        self.ended = True
        self._arrived.wake()

    def shed(self) -> None:
        """Ends the request for the sake of a tenant that has less than its share."""
        self.was_shed = self.began = True
        self._error = errors.unavailable(
            f"queue: is full, and tenant {self.tenant.name} has more than its share of it; try again later"
        )
        # It was not ended by the engine: leaving the ticket cancels it there.
        self._arrived.wake()


def _merged(outputs: Sequence[api.Output]) -> api.Output:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return msgspec.structs.replace(
        outputs[-1],
        token_ids=tuple(i for o in outputs for i in o.token_ids),
        logprobs=tuple(p for o in outputs for p in o.logprobs),
        top_logprobs=tuple(t for o in outputs for t in o.top_logprobs),
        prompt_logprobs=tuple(p for o in outputs for p in o.prompt_logprobs),
        prompt_top_logprobs=tuple(t for o in outputs for t in o.prompt_top_logprobs),
        bound=next((o.bound for o in outputs if o.bound is not None), None),
    )
