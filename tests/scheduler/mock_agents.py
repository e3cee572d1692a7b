"""Mock agents for the scheduler's tests."""

from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import WHOLE_MACHINE

MOCK = "jblock.engine.process.mock:build_engine"


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
