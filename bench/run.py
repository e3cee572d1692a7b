"""Sends a workload to an engine in this process and notes when every token came."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import percentile, progress
from bench.stepper import Stepper
from bench.workload import Arrival
from jblock.engine.api import Engine, Output, Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache

_STALLED_S = 120.0


@dataclasses.dataclass(eq=False)
class Trace:
    """One request as its sender saw it, all times by one clock.

    Attributes:
      arrival: what was asked for.
      due: when it should have been sent (with a bound on those in flight: when it was); latencies
        count from here.
      tokens: generated ids.
      times: when each was received.
      end: when its last output came.
      reason: its finish_reason; None while running.
      error: error code and message, if any.
    """

    arrival: Arrival
    due: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    end: float = 0.0
    reason: str | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a workload brought.

    Attributes:
      traces: one a request, in order of arrival.
      seconds: from the start to the last output.
    """

    traces: tuple[Trace, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole run."""
        return sum(len(t.tokens) for t in self.traces) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Finished requests over the whole run."""
        return sum(t.reason == "length" for t in self.traces) / self.seconds

    @property
    def failed(self) -> int:
        """Requests that did not run to their length."""
        return sum(t.reason != "length" for t in self.traces)

    @property
    def first_token_s(self) -> list[float]:
        """Time to first token of each request, counted from when it was due."""
        return [t.times[0] - t.due for t in self.traces if t.times]

    @property
    def gaps_s(self) -> list[float]:
        """All gaps between the tokens of one request."""
        return [b - a for t in self.traces for a, b in zip(t.times, t.times[1:], strict=False)]

    @property
    def latencies_s(self) -> list[float]:
        """Seconds from due to last token of each request."""
        return [t.end - t.due for t in self.traces]

    def summary(self) -> dict[str, Any]:
        """Figures for a report, in seconds."""
        figures: dict[str, Any] = {
            "seconds": round(self.seconds, 3),
            "requests": len(self.traces),
            "failed": self.failed,
            "tokens_per_second": round(self.tokens_per_second, 2),
        }
        for name in ("first_token_s", "gaps_s", "latencies_s"):
            values = getattr(self, name)
            if values:
                figures[name] = {
                    f"p{p}": round(percentile(values, p), 5) for p in (50, 95, 99, 100)
                }
        return figures


class InlineEngine:
    """The part of `api.Engine` that `measure` needs, over a loop on the caller's own thread: polling
    runs a step. What a request sees is the same; there is no hand-over between threads."""

    def __init__(self, stepper: Stepper):
        self._loop = stepper.loop

    def submit(self, request: Request) -> None:
        """Hands a request to the loop."""
        self._loop.submit(request)

    def poll(self, timeout: float) -> list[Output]:
        """Runs one step; sleeps when there is nothing to do."""
        if self._loop.idle:
            time.sleep(timeout)
            return []
        return self._loop.step()


def make_engine(zoo: Any, config: EngineConfig, cache: Path) -> ThreadEngine:
    """An engine over all chains of a zoo in memory, every program compiled or taken from the folder
    `cache`. Models of random weights soon say the same again and again: nothing is drafted for them."""
    config = dataclasses.replace(config, max_draft_tokens=0)
    engine = ThreadEngine(zoo, dict(zoo.served), config, ExecutableCache(cache))
    engine.wait_until_warm()
    return engine


def measure(
    engine: Engine | InlineEngine,
    arrivals: Sequence[Arrival],
    in_flight: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Sends every arrival when it is due, and waits for all answers.

    Args:
      engine: warm and idle.
      arrivals: in order of time.
      in_flight: at most so many are open at once; None sends whatever is due.
      stop: asked before each; once it says so, nothing more is sent.

    Raises:
      RuntimeError: nothing came for two minutes with requests open.
      EngineDied: the engine's loop ended.
    """
    begin = time.perf_counter()
    traces = tuple(Trace(a, begin + a.time) for a in arrivals)
    by_id = {f"bench-{i}": trace for i, trace in enumerate(traces)}
    unsent = list(reversed(by_id.items()))
    open_count, last = 0, time.perf_counter()
    while unsent or open_count:
        now = time.perf_counter()
        if unsent and stop():
            unsent.clear()
        while unsent and unsent[-1][1].due <= now and (in_flight is None or open_count < in_flight):
            request_id, trace = unsent.pop()
            if in_flight is not None:
                trace.due = now
            engine.submit(_request(request_id, trace.arrival))
            open_count += 1
        waiting = in_flight is None or open_count < in_flight
        next_due = unsent[-1][1].due - now if unsent and waiting else 1.0
        outputs = engine.poll(min(1.0, max(next_due, 0.0)))
        now = time.perf_counter()
        open_count -= _note(by_id, outputs, now)
        if outputs or not open_count:
            last = now
        elif now - last > _STALLED_S:
            raise RuntimeError(f"no output for {_STALLED_S:.0f} s with {open_count} requests open")
    return Measured(tuple(t for t in traces if t.reason), time.perf_counter() - begin)


def interleaved_backlog(
    sides: Mapping[str, Stepper], arrivals: Sequence[Arrival], slice_steps: int = 8
) -> dict[str, Measured]:
    """A closed backlog on several agents that take turns, some steps each, so that whatever else the
    machine does meets all of them alike. An agent's clock runs only while it has its turn, from idle
    to idle device; as many sequences are in flight as it takes.

    Args:
      sides: idle agents by name.
      arrivals: all handed over at the start.
      slice_steps: steps of one turn.
    """
    clocks = dict.fromkeys(sides, 0.0)
    traces = {name: {f"bench-{i}": Trace(a, 0.0) for i, a in enumerate(arrivals)} for name in sides}
    for name, stepper in sides.items():
        for request_id, trace in traces[name].items():
            stepper.loop.submit(_request(request_id, trace.arrival))
    order = list(sides)
    while any(not stepper.loop.idle for stepper in sides.values()):
        order.reverse()
        for name in order:
            loop, device = sides[name].loop, sides[name].device
            device.mark()
            begin, offset = time.perf_counter(), clocks[name]
            for _ in range(slice_steps):
                if not loop.idle:
                    outputs = loop.step()
                    _note(traces[name], outputs, offset + time.perf_counter() - begin)
            device.wait()
            clocks[name] += time.perf_counter() - begin
    return {name: Measured(tuple(traces[name].values()), clocks[name]) for name in sides}


def _note(by_id: Mapping[str, Trace], outputs: Sequence[Output], now: float) -> int:
    """Writes outputs into their traces; how many of them were a request's last."""
    ended = 0
    for output in outputs:
        trace = by_id[output.request_id]
        trace.tokens.extend(output.token_ids)
        trace.times.extend([now] * len(output.token_ids))
        if output.finish_reason:
            trace.end, trace.reason = now, output.finish_reason
            trace.error = f"{output.error_code} {output.error_message}".strip()
            if trace.error:
                progress(f"{output.request_id} failed: {trace.error}")
            ended += 1
    return ended


def _request(request_id: str, arrival: Arrival) -> Request:
    return Request(
        request_id=request_id,
        model=arrival.model,
        token_ids=arrival.prompt,
        sampling=SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True),
    )
