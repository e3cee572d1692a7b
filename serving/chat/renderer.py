"""Renders chat templates in processes that are ended when one takes too long.

Each process renders one conversation at a time. There are as many as conversations are being rendered,
up to a limit, and one stays for the next; starting one takes a tenth of a second.
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

from absl import logging

from serving.chat import render_child

# CPU time of one conversation, which takes a millisecond or a few.
RENDER_SECONDS = 0.6
# How long that may take where the machine is busy.
_WAIT_SECONDS = 15.0
# Starting a process: not the template's fault.
_START_SECONDS = 20.0
_MAX_PROCESSES = 16
_IDLE_PROCESSES = 2
_ENVIRONMENT = ("PATH", "TZ", "LANG", "LC_ALL", "LC_TIME", "SYSTEMROOT")
_HEAD = struct.Struct(">I")
_MAX_REPLY = 8 * render_child.MAX_TEXT


class RenderError(ValueError):
    """There is no text.

    Attributes:
      refused: the messages are to blame; else the template is.
    """

    def __init__(self, message: str, refused: bool):
        super().__init__(message)
        self.refused = refused


class Renderer:
    """The processes of one server. Made and used within one event loop."""

    def __init__(self, seconds: float = RENDER_SECONDS):
        """`seconds` is the CPU time that one conversation may take."""
        self._seconds = seconds
        self._idle: collections.deque[asyncio.subprocess.Process] = collections.deque()
        self._ending: set[asyncio.Task] = set()
        self._places = asyncio.Semaphore(_MAX_PROCESSES)
        self._closed = False

    async def render(self, request: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """Pieces of text, each with whether it is to be encoded as plain text; see `render_child.answer`.

        Raises:
          RenderError: the template refuses the messages, is none, or took too long or too much.
        """
        data = json.dumps(request).encode()
        async with self._places:
            process = await self._take()
            reply: dict[str, Any] | None = None
            try:
                async with asyncio.timeout(_WAIT_SECONDS):
                    reply = await _exchange(process, data)
            except TimeoutError as error:
                raise RenderError(
                    f"it was not done after {_WAIT_SECONDS:g} s and was stopped", refused=False
                ) from error
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 1.0)
                if process.returncode == -signal.SIGPROF:
                    message = f"it took longer than {self._seconds:g} s and was stopped"
                else:
                    message = "it ended the process that renders it"
                raise RenderError(message, refused=False) from error
            finally:
                self._put_back(process, healthy=reply is not None)
        if "error" in reply:
            if reply["kind"] == "template":
                logging.warning("a chat template failed: %s", reply["error"])
            raise RenderError(reply["error"], refused=reply["kind"] == "refused")
        return [(text, bool(plain)) for text, plain in reply["pieces"]]

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
        root = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serving.chat.render_child",
            str(self._seconds),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Little of the server's environment, which may hold secrets.
            env={"PYTHONPATH": path, **{n: os.environ[n] for n in _ENVIRONMENT if n in os.environ}},
            start_new_session=True,  # Ctrl-C is the server's.
            limit=_MAX_REPLY,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _exchange(
                    process,
                    b'{"source":"","added":{},"control":[],"special_tokens":{},'
                    b'"conversation":{"messages":[]}}',
                )
        except BaseException:
            self._end(process)
            raise
        return process

    def _put_back(self, process: asyncio.subprocess.Process, healthy: bool) -> None:
        """Keeps a process for the next conversation, or ends it."""
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
