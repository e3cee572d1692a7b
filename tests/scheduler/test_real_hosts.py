"""Agents as `jblock-agent` starts them, each a process as on a host of its own, and a server's engine over
them: answers are one agent's, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from demo_agents import LONG, answers
from host_agents import free_address, secret_file

from jblock.engine.process.client import FACTORY, ProcessEngine
from serving.engine_processes import start_on_hosts

ROOT = Path(__file__).parent.parent.parent


class Hosts:
    """Processes of `jblock-agent` on addresses of this machine."""

    def __init__(self, count: int, folder: Path):
        self.secret = secret_file(folder)
        self.addresses: list[str] = []
        self.processes: list[subprocess.Popen] = []
        self._programs = str(folder / "programs")
        for _ in range(count):
            self.addresses.append(free_address())
            self.processes.append(self._start(self.addresses[-1]))

    def _start(self, address: str) -> subprocess.Popen:
        words = [f"--listen={address}", f"--secret_file={self.secret}"]
        words.append(f"--executable_cache={self._programs}")
        process = subprocess.Popen(
            [sys.executable, "-m", "jblock.hosts.main", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"jblock-agent: listening on {address}")
        return process

    def replace(self, number: int) -> None:
        """Kills an agent, and starts it again."""
        self.processes[number].kill()
        self.processes[number].wait()
        self.processes[number] = self._start(self.addresses[number])

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            assert process.wait(60) == 0


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["pp=2", ""])
def test_answers_are_those_of_one_agent(kwargs, tmp_path, mesh):
    alone = ProcessEngine(FACTORY, kwargs)
    try:
        expected = answers(alone)
    finally:
        alone.close()
    hosts = Hosts(2, tmp_path)
    places = [lambda address=address: address for address in hosts.addresses]
    own = {k: v for k, v in kwargs.items() if k != "executable_cache"}
    engine = start_on_hosts({**own, "mesh": mesh}, places, {"secret_file": hosts.secret}, 30.0)
    try:
        # The processes with the engines are killed, the other one's first.
        got = answers(engine, (1, 0))
        hosts.replace(1)  # Its engine ends with it; the server finds the new one.
        again = answers(engine)
        limit = time.monotonic() + LONG
        while not all(agent.up for agent in engine.agents()):
            assert time.monotonic() < limit, "not in time"
            engine.poll(0.1)
        assert engine.stats().compiles_on_serving_path == 0
        assert engine.stats().restarts == 3
    finally:
        engine.close()
        hosts.close()
    for name, tokens in (got | {f"last{name}": t for name, t in again.items()}).items():
        assert tokens == expected["0/" + name.partition("/")[2]], name
