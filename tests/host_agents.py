"""Secrets, ports and agents with mock engines for tests."""

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.hosts.agent import Agent
from jblock.hosts.credentials import Credentials, from_files
from jblock.hosts.remote_child import RemoteChild

MOCK = "jblock.engine.process.mock:build_engine"
LONG = 120.0


def secret_file(folder: Path, name: str = "secret", text: str = "0123456789abcdef" * 4) -> str:
    """The path of a file with a secret."""
    path = folder / name
    path.touch(0o600)
    path.write_text(text)
    return str(path)


def free_address() -> str:
    """An address whose port, and the one after it, nobody listens on now; the system gives neither to anybody
    who wants just any port."""
    while True:
        port = random.SystemRandom().randrange(11_000, 32_000, 2)
        with contextlib.suppress(OSError):
            for number in (port, port + 1):
                socket.create_server(("127.0.0.1", number)).close()
            return f"127.0.0.1:{port}"


def mock_agent(address: str, secret: str) -> Agent:
    """An agent that starts mock engines."""
    return Agent(address, {"secret_file": secret}, factories=(MOCK,))


def remote_engine(address: str, credentials: Credentials | str, **kwargs) -> ProcessEngine:
    """A mock engine beside the agent at an address."""
    if isinstance(credentials, str):
        credentials = from_files({"secret_file": credentials})
    known = credentials
    return ProcessEngine(MOCK, kwargs, begin=lambda: RemoteChild(lambda: address, known))


def answer(engine: api.Engine, name: str = "r", tokens: int = 3) -> list[int]:
    """The tokens of one request."""
    sampling = api.SamplingParams(max_tokens=tokens, ignore_eos=True)
    engine.submit(api.Request(request_id=name, model="echo", token_ids=(4, 5), sampling=sampling))
    found: list[int] = []
    limit = time.monotonic() + LONG
    while time.monotonic() < limit:
        for output in engine.poll(1.0):
            found += output.token_ids
            if output.finish_reason:
                assert output.finish_reason == "length", output
                return found
    raise AssertionError("not in time")


def eventually(check: Callable[[], bool]) -> bool:
    """Whether something becomes true."""
    limit = time.monotonic() + LONG
    while not check():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
