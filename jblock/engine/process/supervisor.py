"""An engine that outlives its processes: one that dies or freezes is replaced, and what it owed goes on.

The supervisor keeps of every open request its prompt and the tokens delivered so far, so a new process takes
it up where it stood; clients see a pause. What the dead process was computing is under suspicion
(`suspects.py`): it runs again in ever smaller groups before anything else, and only a request that ended a
process while it ran alone is refused.
"""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.suspects import Held, Suspects

# Deaths in a row without a token delivered after which restarting is of no help; on top, one for each time
# that the requests under suspicion can be halved.
_MOST_DEATHS = 5
# Seconds before the second restart in a row that brought no token; twice as many before each one after it.
_BACKOFF_SECONDS, _LONGEST_BACKOFF = 0.5, 30.0
# How often a process that warms up is looked at.
_LOOK_SECONDS = 0.05
# Polls whose tokens are kept as they came before each request is given its own.
_MOST_NOTED = 16

Start = Callable[[Sequence[str]], ProcessEngine]
"""Starts a process that serves these chains ("name@version"), or of none those of the configuration."""


class SupervisedEngine(api.Engine):
    """Implements `jblock.engine.api.Engine` over processes that may die. `poll` does the supervising, so it
    has to be called all the time, from one thread."""

    def __init__(self, start: Start, *, backoff_seconds: float = _BACKOFF_SECONDS):
        """Starts the first process and returns at once; `models` waits for it.

        Args:
          start: called now and after every death, with what was served last.
          backoff_seconds: see `_BACKOFF_SECONDS`.
        """
        self._start, self._backoff = start, backoff_seconds
        self._changed = threading.Condition()
        self._engine: ProcessEngine | None = start(())
        self._models: tuple[api.ModelInfo, ...] = ()  # Empty until the first process was warm.
        self._warm = False
        self._open: dict[str, Held] = {}
        self._suspects = Suspects()
        self._outputs: list[api.Output] = []
        self._noted: list[
            list[api.Output]
        ] = []  # Passed on, and not yet given to those in `_open`.
        self._may_submit = False  # One of `_open` may wait to be submitted.
        self._past = api.EngineStats()  # Counters of the processes that are gone.
        self._restarts = self._resumed = 0
        self._barren = self._allowed = (
            0  # Deaths in a row without a token, and how many there may be.
        )
        self._restart_at = 0.0
        self._died_at = 0.0
        self._failure: api.EngineDied | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """Process id of the present process; 0 between two."""
        engine = self._engine
        return engine.pid if engine is not None else 0

    @property
    def is_up(self) -> bool:
        """Whether the present process is warm and alive."""
        return self._warm

    @property
    def served(self) -> tuple[api.ModelInfo, ...]:
        """What is served, or was when a process was last warm; empty before the first was."""
        return self._models

    @property
    def is_free(self) -> bool:
        """Whether a request that is submitted now runs at once, and not after others under suspicion."""
        return self._warm and not self._suspects

    def models(self) -> tuple[api.ModelInfo, ...]:
        """The served chains; blocks until the first process is warm.

        Raises:
          ValueError: the factory refused its arguments.
          EngineDied: the first process ended before it was warm, or restarting did not help.
        """
        engine = self._engine
        if not self._models and engine is not None:
            models = engine.models()
            with self._changed:
                if engine is self._engine and not self._warm:
                    self._become_warm(models)
        if self._failure is not None:
            raise self._failure
        return self._models

    def submit(self, request: api.Request) -> None:
        """Hands a request over, now or when there is a process again; never blocks."""
        held = held_of(request)
        with self._changed:
            if request.request_id in self._open:
                message = f"request_id {request.request_id!r} is already in flight; give another"
                self._outputs.append(error_output(held.id, "INVALID_ARGUMENT", message))
                return
            self._open[held.id] = held
            self._may_submit = True
            self._submit_next()

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end; never blocks."""
        with self._changed:
            held = self._open.get(request_id)
            if held is None:
                return
            if held.submitted and self._engine is not None:
                held.cancelled = True
                self._engine.cancel(request_id)
            else:
                self._end(api.Output(request_id=request_id, finish_reason="cancelled"))

    def poll(self, timeout: float) -> list[api.Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first. Replaces a process that
        died meanwhile.

        Raises:
          EngineDied: restarting does not help.
        """
        end = time.monotonic() + timeout
        while True:
            with self._changed:
                if self._closed:
                    return []
                if self._outputs:
                    outputs, self._outputs = self._outputs, []
                    return outputs
                if self._failure is not None:
                    raise self._failure
                engine = self._revive()
                self._submit_next()
                left = max(end - time.monotonic(), 0.0)
                wait = left if self._warm and not self._suspects else min(left, _LOOK_SECONDS)
            if engine is None:
                time.sleep(wait)
            else:
                try:
                    outputs = engine.poll(wait)
                except api.EngineDied as error:
                    self._replace(engine, error)
                    continue
                with self._changed:
                    outputs = self._account(outputs)
                    self._submit_next()
                if outputs:
                    return outputs
            if time.monotonic() >= end and not self._outputs:
                return []

    def adopt(self, held: Held) -> None:
        """Takes up a request of another engine, after the tokens it has; its id must not be in flight."""
        with self._changed:
            self._open[held.id] = held
            self._may_submit = True
            self._submit_next()

    def release(self, wanted: Callable[[Held], bool]) -> list[Held]:
        """Hands over what may run in another engine while it cannot run here: requests that wait for a
        process, or for others under suspicion, and that were suspect once at most: a second time they are
        looked into here. Where the engine has failed for good it is all that `wanted` takes.

        Args:
          wanted: whether somebody takes it.
        """
        with self._changed:
            if self.is_free:
                return []
            given = [
                held
                for held in self._open.values()
                if not held.submitted and (held.deaths < 2 or self._failure) and wanted(held)
            ]
            for held in given:
                del self._open[held.id]
            self._suspects.forget({held.id for held in given})
            return given

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """Serves exactly these chains; waits for a process that is warm first. Later processes serve what
        was served last.

        Raises:
          UnknownChain, ValueError: the engine refused; nothing changed.
          EngineDied: the process died over this change, which is not made again, or restarting does not help.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._warm or self._closed or self._failure)
            engine = self._engine
            if self._failure is not None:
                raise self._failure
            if self._closed or engine is None:
                raise api.EngineDied("the engine was closed; build another one")
        try:
            infos = engine.serve(models, base)
        except api.EngineDied as error:
            raise api.EngineDied(
                f"{error}, during this change; a new process serves what was served before"
            ) from error
        with self._changed:
            if engine is self._engine:
                self._models = engine.models()
        return infos

    def note_service(self) -> None:
        """Its process served, though not by tokens of its own: earlier deaths do not count."""
        self._barren = self._allowed = 0

    def stats(self) -> api.EngineStats:
        """Counters over all processes, and the gauges of the present one."""
        with self._changed:
            engine = self._engine
            now = engine.stats() if engine is not None else api.EngineStats()
            return dataclasses.replace(
                _added(self._past, now),
                restarts=self._restarts,
                resumed_requests=self._resumed,
                suspects=len(self._suspects.ids),
            )

    def close(self) -> None:
        """Stops the present process; there will be no other."""
        with self._changed:
            if self._closed:
                return
            self._closed, self._warm = True, False
            engine = self._engine
            self._changed.notify_all()
        if engine is not None:
            engine.close()

    # What follows is called with the lock held, but for `_replace`.

    def _account(self, outputs: list[api.Output]) -> list[api.Output]:
        """Keeps what a resumed request will need, and passes the outputs on. Most polls bring a token for
        each request, and are put aside as they are: looking each up takes longer than all else here."""
        is_plain = all(output.finish_reason is None for output in outputs)
        if is_plain and not self._suspects and len(self._noted) < _MOST_NOTED:
            self._noted.append(outputs)
            return outputs
        self._settle()
        passed = []
        for output in outputs:
            held = self._open.get(output.request_id)
            if held is None:
                continue
            self._take(held, output)
            if output.finish_reason is not None:
                del self._open[output.request_id]
                if held.delivered and output.error_code in ("ABORTED", "NOT_FOUND"):
                    # Its client has tokens of a version that the new process does not serve.
                    message = f"{output.error_message}; the engine's process was replaced meanwhile"
                    output = error_output(output.request_id, "UNAVAILABLE", message)
            passed.append(output)
        self._suspects.look(self._open)
        return passed

    def _settle(self) -> None:
        """Gives each request what was put aside of it."""
        for outputs in self._noted:
            for output in outputs:
                if (held := self._open.get(output.request_id)) is not None:
                    self._take(held, output)
        self._noted.clear()

    def _take(self, held: Held, output: api.Output) -> None:
        if output.token_ids:
            self._barren = self._allowed = 0
        held.take(output)

    def _end(self, output: api.Output) -> None:
        del self._open[output.request_id]
        self._outputs.append(output)

    def _submit_next(self) -> None:
        """Hands the process what may run now: the next group under suspicion, or all that waits."""
        if not self._warm or self._engine is None or not self._may_submit:
            return
        for held in self._suspects.next(self._open):
            if held.submissions:
                self._resumed += 1
            self._engine.submit(held.resumed())
        self._may_submit = bool(self._suspects)  # Then others wait for those.

    def _become_warm(self, models: tuple[api.ModelInfo, ...]) -> None:
        self._models, self._warm = models, True
        if self._restarts:
            pause = time.monotonic() - self._died_at
            logging.info("the engine is up again after %.1f s", pause)
        self._submit_next()
        self._changed.notify_all()

    def _revive(self) -> ProcessEngine | None:
        """The process, started where its time has come, and noticed where it is warm."""
        if self._engine is None and time.monotonic() >= self._restart_at:
            served = [f"{m.name}@{m.version}" for m in self._models]
            self._engine = self._start(served)
        engine = self._engine
        if engine is not None and not self._warm and engine.is_warm:
            self._become_warm(engine.models())
        return engine

    def _replace(self, engine: ProcessEngine, error: api.EngineDied) -> None:
        """Takes stock after a death and plans the next start."""
        engine.close()
        with self._changed:
            if self._closed:
                return
            if not self._models:
                self._failure = error
                raise error
            self._settle()
            self._may_submit = True
            self._past = _added(self._past, dataclasses.replace(engine.stats(), **_ZERO))
            self._engine, self._warm = None, False
            self._died_at = time.monotonic()
            self._restarts += 1
            self._barren += 1
            for held in [h for h in self._open.values() if h.cancelled]:
                self._end(api.Output(request_id=held.id, finish_reason="cancelled"))
            self._allowed = max(self._allowed, _MOST_DEATHS + len(self._open).bit_length())
            refused = self._suspects.died(self._open, engine.running)
            logging.error(
                "%s; %d requests are open, %d of them under suspicion",
                error,
                len(self._open),
                len(self._suspects.ids),
            )
            if refused is not None:
                logging.error("request %s is refused: it ended a process alone", refused)
                self._end(error_output(refused, "INTERNAL", _refusal(error)))
            if self._barren > self._allowed:
                self._failure = api.EngineDied(
                    f"{error}; {self._barren} processes in a row ended before they served a token, so it is "
                    "not started again"
                )
                self._changed.notify_all()
                return
            delay = 0.0
            if self._barren > 1:
                delay = min(self._backoff * 2 ** (self._barren - 2), _LONGEST_BACKOFF)
            if self._suspects:
                delay = min(delay, self._backoff)  # Each of these restarts narrows the search.
            self._restart_at = self._died_at + delay


_ZERO: Mapping[str, Any] = {**dict.fromkeys(api.GAUGES, 0), "tenants": (), "blocks": ()}


def _added(past: api.EngineStats, now: api.EngineStats) -> api.EngineStats:
    """The counters of both, and the gauges of now."""
    counters = {
        f.name: getattr(past, f.name) + getattr(now, f.name)
        for f in dataclasses.fields(api.EngineStats)
        if f.name not in api.GAUGES
    }
    return dataclasses.replace(now, **counters)


def held_of(request: api.Request) -> Held:
    """What is kept of a request. A seed is drawn for one without, so that it draws the same tokens wherever
    it goes on."""
    if request.sampling.seed is None:
        sampling = dataclasses.replace(request.sampling, seed=secrets.randbits(32))
        request = dataclasses.replace(request, sampling=sampling)
    return Held(request)


def error_output(request_id: str, code: str, message: str) -> api.Output:
    """The last output of a request that fails."""
    return api.Output(
        request_id=request_id, finish_reason="error", error_code=code, error_message=message
    )


def _refusal(error: api.EngineDied) -> str:
    return (
        f"this request ended the engine's process while it ran alone ({error}); it is not tried again: "
        "change it, and report it with the server's log"
    )
