"""Runs a driver in its engine's environment and watches how much memory its processes take."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent
_PERIOD_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a driver brought.

    Attributes:
      result: its figures; None for one that only prepares.
      start_s: from process start until it could take requests.
      peak_bytes: most resident memory of it and all its children together, as the kernel counts it
        (pages two of them share count twice).
    """

    result: dict[str, Any] | None
    start_s: float
    peak_bytes: int


def run(python: str, module: str, spec: Mapping[str, Any], timeout: float) -> Ran:
    """Runs `module`'s driver with `python` on `spec`, whose folder gets its logs.

    Raises:
      RuntimeError: it failed or took longer than `timeout` seconds; ends with what it said last.
    """
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    out, log, file = (folder / f"{spec['work']}.{end}" for end in ("out", "log", "json"))
    out.unlink(missing_ok=True)
    file.write_text(json.dumps({**spec, "out": str(out)}, indent=2))
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    # Told to stop, we still stop the engine first: it has a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begin = time.time()
    with log.open("wb") as stream:
        child = subprocess.Popen(
            [python, "-m", module, str(file)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
        watch = _MemoryWatch(child.pid)
        try:
            code: int | None = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            watch.stop()
            # Its engine's processes are in its session; none may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code != 0:
        what = f"took longer than {timeout:.0f} s" if code is None else f"ended with {code}"
        raise RuntimeError(f"{module} {what}:\n{log.read_text(errors='replace')[-3000:]}")
    lines = [json.loads(x) for x in out.read_text().splitlines()] if out.exists() else []
    said = {key: value for line in lines for key, value in line.items()}
    return Ran(said.get("result"), round(said.get("ready", begin) - begin, 2), watch.peak_bytes)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, now."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:
                continue
            # The name, in parentheses, may hold anything.
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        todo.extend(parents.get(one, ()))
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * _PAGE
        except OSError:
            continue
    return total


class _MemoryWatch(threading.Thread):
    """Samples `resident_bytes` ten times a second.

    Attributes:
      peak_bytes: most seen.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak_bytes, self._pid, self._done = 0, pid, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self._pid))

    def stop(self) -> None:
        """Takes no more samples."""
        self._done.set()
        self.join()
