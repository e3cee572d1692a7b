"""Mock agents for the scheduler's tests, and a reader of what they answer."""

import collections
import threading
import time

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import WHOLE_MACHINE

MOCK = "jblock.engine.process.mock:build_engine"
LONG = 60.0


class Agents:
    """Starts mock agents and remembers them.

    Attributes:
      started: (agent, what it was told to serve), in order.
      engines: the last process of each agent.
      broken: agents whose next processes end at their start.
      slow: seconds that the next processes take to start.
    """

    def __init__(self, heartbeat_seconds: float = 0.0, seats=None, **kwargs):
        self.started: list[tuple[int, tuple[str, ...]]] = []
        self.engines: dict[int, ProcessEngine] = {}
        self.broken: set[int] = set()
        self.slow = 0.0
        self._kwargs = {"step_delay": 0.005, **kwargs}
        self._heartbeat, self._seats = heartbeat_seconds, seats

    def __call__(self, agent, served, notify) -> ProcessEngine:
        self.started.append((agent, tuple(served)))
        kwargs = dict(self._kwargs)
        if served:
            known = [*kwargs.get("models", [{"name": "echo"}]), *kwargs.get("more", ())]
            kwargs["models"] = [
                m for m in known if {m["name"], f"{m['name']}@{m.get('version', 1)}"} & set(served)
            ]
            kwargs["more"] = known
        if self.slow:
            kwargs["start_delay"] = self.slow
        if agent in self.broken:
            kwargs["exit_at_start"] = 7
        self.engines[agent] = ProcessEngine(
            MOCK,
            kwargs,
            heartbeat_seconds=self._heartbeat,
            seat=self._seats[agent] if self._seats else WHOLE_MACHINE,
            notify=notify,
        )
        return self.engines[agent]


class Reader(threading.Thread):
    """Polls an engine as a server would, and keeps what came by request.

    Attributes:
      tokens: by request id.
      ends: the last output of each request that ended.
      failure: what ended the polling.
    """

    def __init__(self, engine: api.Engine):
        super().__init__(daemon=True)
        self.tokens: dict[str, list[int]] = collections.defaultdict(list)
        self.ends: dict[str, api.Output] = {}
        self.failure: Exception | None = None
        self.stopping = False
        self._engine = engine

    def run(self) -> None:
        try:
            self._engine.models()
            while not self.stopping:
                for output in self._engine.poll(0.05):
                    assert output.request_id not in self.ends
                    self.tokens[output.request_id] += output.token_ids
                    if output.finish_reason:
                        self.ends[output.request_id] = output
        except Exception as error:
            self.failure = error


def until(check, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def request(name: str, prompt=(7, 8, 9), model: str = "echo", **sampling) -> api.Request:
    options = {"max_tokens": 60, **sampling}
    return api.Request(
        request_id=name,
        model=model,
        token_ids=tuple(prompt),
        sampling=api.SamplingParams(**options),
    )


def echoed(prompt, count: int, offset: int = 0) -> list[int]:
    return [prompt[i % len(prompt)] + offset for i in range(count)]
