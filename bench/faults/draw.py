"""Which faults happen, drawn from a seed, and having them happen to agents' processes."""

import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.faults.agent import tell
from bench.faults.port import KINDS as MESSAGE_KINDS

KINDS = (
    "kill",
    "stop",
    "freeze",
    *MESSAGE_KINDS,
    "pages",
    "device_memory",
    "slow_reads",
    "failing_reads",
    "clock",
    "dead_zoo",
)
"""Killed; stopped and continued; stopped for good, until the heartbeat's limit; messages; no page of KV free
and no memory of the device; reads of the zoo that take half a second each, or fail; clocks that step; a zoo
that is not there."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One of them.

    Attributes:
      kind: of `KINDS`.
      agent: to which it happens.
      seconds: it lasts; of clocks, by how much they step.
      count: messages that it concerns.
    """

    kind: str
    agent: int
    seconds: float
    count: int


def draw(rng: random.Random, agents: int, kinds: tuple[str, ...] = KINDS) -> Fault:
    """The next fault of a seed."""
    kind, agent = rng.choice(kinds), rng.randrange(agents)
    seconds = rng.uniform(-20, 20) if kind == "clock" else rng.uniform(0.1, 2.0)
    # A request over which links break three times in a row is refused, and rightly.
    count = 1 if kind == "cut" else rng.randint(1, 4)
    return Fault(kind, agent, round(seconds, 2), count)


class Injector:
    """Has faults happen to the processes of an engine."""

    def __init__(self, engine: Any, folder: Path, zoo: Path):
        """The engine has `pids`; its agents are `bench.faults.agent`'s, with sockets in the folder."""
        self._engine, self._folder, self._zoo = engine, folder, zoo
        self._ends: list[tuple[float, Callable[[], None]]] = []

    @property
    def calm(self) -> bool:
        """Whether nothing that was injected goes on."""
        return not self._ends

    def inject(self, fault: Fault) -> None:
        """Has it begin; `tend` ends it."""
        pid = self._engine.pids[fault.agent]
        end: Callable[[], None] = lambda: None
        if fault.kind in ("kill", "freeze", "stop"):
            _signal(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            if fault.kind == "stop":
                end = lambda: _signal(pid, signal.SIGCONT)
        elif fault.kind == "dead_zoo":
            aside = self._zoo.with_name("aside")
            if not aside.exists():
                self._zoo.rename(aside)
                end = lambda: _rename(aside, self._zoo)
        else:
            tell(self._folder, fault.agent, fault.kind, fault.seconds, fault.count)
        self._ends.append((time.monotonic() + max(fault.seconds, 0.0), end))

    def tend(self) -> None:
        """Ends what is over."""
        now = time.monotonic()
        over = [end for due, end in self._ends if due <= now]
        self._ends = [one for one in self._ends if one[0] > now]
        for end in over:
            end()


def _rename(old: Path, new: Path) -> None:
    old.rename(new)


def _signal(pid: int, number: int) -> None:
    """A process that is not there any more gets none."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
