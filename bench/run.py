"""Sends a workload to an engine in this process and notes when every token came."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import percentile, progress
from bench.workload import Arrival
from jblock.engine.agent import ThreadEngine
from jblock.engine.api import Engine, Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.executable_cache import ExecutableCache

_STALLED_S = 120.0


@dataclasses.dataclass(eq=False)
class Trace:
    """One request as its sender saw it, all times by one clock.

    Attributes:
      arrival: what was asked for.
      due: when it should have been sent; latencies count from here.
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


def make_engine(zoo: Any, config: EngineConfig, cache: Path) -> ThreadEngine:
    """An engine over all chains of a zoo in memory, every program compiled or taken from the folder
    `cache`."""
    engine = ThreadEngine(zoo, dict(zoo.chains), config, ExecutableCache(cache))
    engine.settle()
    return engine


def measure(engine: Engine, arrivals: Sequence[Arrival], in_flight: int | None = None) -> Measured:
    """Sends every arrival when it is due, and waits for all answers.

    Args:
      engine: warm and idle.
      arrivals: in order of time.
      in_flight: at most so many are open at once; None sends whatever is due.

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
        while unsent and unsent[-1][1].due <= now and (in_flight is None or open_count < in_flight):
            request_id, trace = unsent.pop()
            engine.submit(_request(request_id, trace.arrival))
            open_count += 1
        waiting = in_flight is None or open_count < in_flight
        next_due = unsent[-1][1].due - now if unsent and waiting else 1.0
        outputs = engine.poll(min(1.0, max(next_due, 0.0)))
        now = time.perf_counter()
        for output in outputs:
            trace = by_id[output.request_id]
            trace.tokens.extend(output.token_ids)
            trace.times.extend([now] * len(output.token_ids))
            if output.finish_reason:
                trace.end, trace.reason = now, output.finish_reason
                trace.error = f"{output.error_code} {output.error_message}".strip()
                if trace.error:
                    progress(f"{output.request_id} failed: {trace.error}")
                open_count -= 1
        if outputs or not open_count:
            last = now
        elif now - last > _STALLED_S:
            raise RuntimeError(f"no output for {_STALLED_S:.0f} s with {open_count} requests open")
    return Measured(traces, time.perf_counter() - begin)


def _request(request_id: str, arrival: Arrival) -> Request:
    return Request(
        request_id=request_id,
        model=arrival.model,
        token_ids=arrival.prompt,
        sampling=SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True),
    )
