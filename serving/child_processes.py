"""Work that others' input decides, done in processes that are ended when it takes too long or too much.

Each process does one thing at a time. There are as many as are needed, up to a limit, and one or two stay for
the next; starting one takes a tenth of a second. `serving.limited_child` is their side.
"""

import asyncio
import collections
import contextlib
import json
import os
import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How long one answer may take where the machine is busy.
_WAIT_SECONDS = 15.0
# Starting a process: not the input's fault.
_START_SECONDS = 60.0
_IDLE_PROCESSES = 2
_ENVIRONMENT = ("PATH", "TZ", "LANG", "LC_ALL", "LC_TIME", "SYSTEMROOT")
_HEAD = struct.Struct(">I")


class ChildError(Exception):
    """There is no answer; the message says what happened to the process."""


class ChildProcesses:
    """Those of one kind. Made and used within one event loop."""

    def __init__(self, module: str, first: Mapping[str, Any], seconds: float, most: int):
        """Starts none yet.

        Args:
          module: whose `main` answers.
          first: asked of each process that was started, to see that it answers.
          seconds: CPU time that one answer may take.
          most: processes at a time.
        """
        self._module, self._first, self._seconds = module, json.dumps(first).encode(), seconds
        self._idle: collections.deque[asyncio.subprocess.Process] = collections.deque()
        self._ending: set[asyncio.Task] = set()
        self._places = asyncio.Semaphore(most)
        self._closed = False

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a process.

        Raises:
          ChildError: it took too long or too much, and was ended; or its process does not begin.
        """
        data = json.dumps(request).encode()
        async with self._places:
            try:
                process = await self._take()
            except TimeoutError as error:
                raise ChildError(
                    f"its process had not begun after {_START_SECONDS:g} s; try again"
                ) from error
            reply: dict[str, Any] | None = None
            try:
                async with asyncio.timeout(_WAIT_SECONDS):
                    reply = await _exchange(process, data)
            except TimeoutError as error:
                raise ChildError(
                    f"it was not done after {_WAIT_SECONDS:g} s and was stopped"
                ) from error
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 1.0)
                if process.returncode == -signal.SIGPROF:
                    message = f"it took longer than {self._seconds:g} s and was stopped"
                else:
                    message = "it ended the process that works on it"
                raise ChildError(message) from error
            finally:
                self._put_back(process, healthy=reply is not None)
        return reply

    async def close(self) -> None:
        """Ends the processes."""
        self._closed = True
        while self._idle:
            self._end(self._idle.pop())
        await asyncio.gather(*self._ending)

    async def _take(self) -> asyncio.subprocess.Process:
        """A process that nobody uses."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        """A process that has imported all it needs."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            str(self._seconds),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Little of the server's environment, which may hold secrets.
            env={"PYTHONPATH": path, **{n: os.environ[n] for n in _ENVIRONMENT if n in os.environ}},
            start_new_session=True,  # Ctrl-C is the server's.
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _exchange(process, self._first)
        except BaseException:
            self._end(process)
            raise
        return process

    def _put_back(self, process: asyncio.subprocess.Process, healthy: bool) -> None:
        """Keeps a process for what comes next, or ends it."""
        if healthy and not self._closed and len(self._idle) < _IDLE_PROCESSES:
            self._idle.append(process)
        else:
            self._end(process)

    def _end(self, process: asyncio.subprocess.Process) -> None:
        """Ends a process; somebody has to wait for it, or its pipes stay open."""
        task = asyncio.create_task(_killed(process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _exchange(process: asyncio.subprocess.Process, data: bytes) -> dict[str, Any]:
    """Sends one message; the answer."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_HEAD.pack(len(data)) + data)
    await process.stdin.drain()
    size = _HEAD.unpack(await process.stdout.readexactly(_HEAD.size))[0]
    return json.loads(await process.stdout.readexactly(size))


async def _killed(process: asyncio.subprocess.Process) -> None:
    """Kills a process and closes its pipes."""
    assert process.stdin is not None
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.stdin.close()
    await process.wait()
    with contextlib.suppress(ConnectionError):
        await process.stdin.wait_closed()
