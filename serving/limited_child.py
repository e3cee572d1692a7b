"""A process of `serving.child_processes`: it answers one JSON message with another, within limits."""

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_MEMORY_BYTES = 512 * 10**6
_HEAD = struct.Struct(">I")


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers until its parent closes the pipe. The first argument of the command line is the seconds of CPU
    time that one answer may take: SIGPROF ends the process then, wherever in C it is."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = float(sys.argv[1])
    given, taken = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What anything prints goes to the log.
    while (data := _read(given)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(answer(json.loads(data))).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken.write(_HEAD.pack(len(reply)) + reply)
        taken.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size = _HEAD.unpack(head)[0]
    data = stream.read(size)
    return data if len(data) == size else None
