"""Servers in processes of their own, and when they have compiled all."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

# Seconds without a program compiled after which an engine has all of them.
_QUIET_S = 8.0


class ServerProcess:
    """A server that prints its ports: of gRPC, of HTTP, and perhaps another.

    Attributes:
      pid: its process.
      ports: these.
    """

    def __init__(self, command: Sequence[str], pattern: str):
        self._command, self._pattern = command, pattern
        self.ports: tuple[int, ...] = ()

    def __enter__(self) -> "ServerProcess":
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        found = re.search(self._pattern, self._process.stdout.readline())
        if found is None:
            self._process.kill()
            raise RuntimeError(f"{self._command[2]} did not start; it said why above")
        self.ports = tuple(map(int, found.groups()))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.wait(60)


def serve(settings: dict[str, Any]) -> ServerProcess:
    """`jblock-serve` over the same engine."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    ports = ["--port=0", "--http_port=0", "--metrics_port=0"]
    return ServerProcess(
        [sys.executable, "-m", "serving.main", *flags, *ports],
        r":(\d+), HTTP on port (\d+), metrics on port (\d+)",
    )


def settle(compiled: Callable[[], float]) -> None:
    """Waits until nothing was compiled in the background for a while."""
    count, since = -1.0, time.monotonic()
    while time.monotonic() - since < _QUIET_S:
        time.sleep(0.5)
        if (now := compiled()) != count:
            count, since = now, time.monotonic()


def compiled_in_background(port: int) -> float:
    """What a server has compiled in the background."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        found = re.search(
            r"^jblock_compiles_in_background_total (\S+)", reply.read().decode(), re.M
        )
    return float(found[1]) if found else 0.0
