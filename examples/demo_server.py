"""A jblock-serve of the demo's own: started, watched, asked for its counters, and always stopped."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

from prometheus_client.parser import text_string_to_metric_families

from examples.demo_reference import DemoError

_READY = re.compile(
    r"^jblock: serving .* on ([\w.]+:\d+), metrics on port (\d+)(?:;.*)?$", re.MULTILINE
)
_START_SECONDS = 600
# After SIGTERM: what open requests get, and what the whole process gets before it is killed.
_DRAIN_SECONDS = 2
_STOP_SECONDS = 20
_running: list[subprocess.Popen] = []


class Server:
    """A running server.

    Attributes:
      process: of the server; the engine is a child of it and ends with it.
      target: "host:port".
    """

    def __init__(self, process: subprocess.Popen, log: pathlib.Path):
        self.process = process
        self.target = ""
        self._log = log
        self._metrics = ""

    def wait_until_ready(self) -> None:
        """Waits for the line the server prints once it answers requests.

        Raises:
          DemoError: it ended, or took too long; the message has the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            ready = _READY.search(self._log.read_text(errors="replace"))
            if ready:
                self.target = ready[1]
                self._metrics = f"http://127.0.0.1:{ready[2]}/metrics"
                return
            if self.process.poll() is not None:
                raise DemoError(
                    f"the server ended with code {self.process.returncode} before it was ready.\n"
                    f"The end of {self._log}:\n{self._last_words()}"
                )
            time.sleep(0.1)
        raise DemoError(f"the server was not ready after {_START_SECONDS} seconds; see {self._log}")

    def counters(self) -> dict[str, float]:
        """The engine's counters and gauges, by the names of jblock.engine.api.EngineStats.

        Waits until the engine is idle, so that nothing is missing.

        Raises:
          DemoError: the server does not answer.
        """
        deadline = time.monotonic() + 10
        while True:
            found = self._scrape()
            if not found["running"] + found["waiting"] or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _scrape(self) -> dict[str, float]:
        try:
            with urllib.request.urlopen(self._metrics, timeout=10) as answer:
                text = answer.read().decode()
        except OSError as error:
            raise DemoError(
                f"the server does not answer at {self._metrics} ({error}).\n"
                f"The end of {self._log}:\n{self._last_words()}"
            ) from error
        return {
            family.name.removeprefix("jblock_"): family.samples[0].value
            for family in text_string_to_metric_families(text)
            if len(family.samples) == 1 and not family.samples[0].labels
        }

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


@contextlib.contextmanager
def start(zoo: pathlib.Path, models: Sequence[str], log: pathlib.Path) -> Iterator[Server]:
    """Starts a server on free ports; it is gone when the block ends, however that ends.

    Args:
      zoo: folder of the zoo.
      models: what to serve.
      log: file that gets all it prints.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command(
                zoo,
                models,
                "--port=0",
                "--metrics_port=0",
                f"--drain_seconds={_DRAIN_SECONDS}",
            ),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches a terminal's whole group; the server is to hear of it from us.
            start_new_session=True,
        )
        _running.append(process)
    try:
        yield Server(process, log)
    finally:
        _stop(process)
        _running.remove(process)


def stop_all() -> None:
    """Ends every server that `start` started, for one who will not leave its block."""
    for process in _running:
        _stop(process)


def command(zoo: pathlib.Path, models: Sequence[str], *flags: str) -> list[str]:
    """The command line of `jblock-serve`, by module so that no PATH is needed."""
    return [
        sys.executable,
        "-m",
        "serving.main",
        f"--zoo={zoo}",
        f"--models={','.join(models)}",
        *flags,
    ]


def _stop(process: subprocess.Popen) -> None:
    """Ends a process within a bounded time; another Ctrl-C meanwhile changes nothing."""
    ignored = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The engine notices the end of its pipe and ends too.
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_STOP_SECONDS)
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)
