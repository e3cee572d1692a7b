"""A line of JSON for each request that is over: who, when, how it ended and what it took; never its text."""

import datetime
import logging
import logging.handlers
import os
import queue
import sys
import time

import grpc
import msgspec

from serving.call_info import CallInfo

# Lines that wait to be written; past them they are lost, and counted: a disk that hangs stops no answer.
_MOST_WAITING = 10_000


class RequestLog:
    """Written by a thread of its own, to a file that may be moved away meanwhile (as logrotate does)."""

    def __init__(self, path: str):
        """`path` is a file, which only we can read where we make it; "-" is standard error.

        Raises:
          OSError: it cannot be written.
        """
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_WAITING)
        self._lost = 0
        self._file = _to(path)
        self._listener = logging.handlers.QueueListener(self._lines, self._file)
        self._listener.start()

    def ended(
        self, call: CallInfo, model: str, code: grpc.StatusCode, field: str | None = None
    ) -> None:
        """Notes a call that is over.

        Args:
          call: the call.
          model: a served model's name, or "".
          code: how it ended.
          field: what a refusal names as wrong, or as the cause.
        """
        usage = call.usage
        entry = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": call.request_id,
            "protocol": call.protocol,
            "tenant": call.tenant.name,
            "model": model,
            "code": code.name,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "seconds": round(time.monotonic() - call.begin, 6),
        }
        if usage.time_to_first_token:
            entry["time_to_first_token"] = round(usage.time_to_first_token, 6)
        if field:
            entry["field"] = field
        if self._lost:
            entry["lost_before"] = self._lost
        try:
            line = msgspec.json.encode(entry).decode()
            self._lines.put_nowait(logging.makeLogRecord({"msg": line}))
            self._lost = 0
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Writes what waits."""
        self._listener.stop()
        self._file.close()


def _to(path: str) -> logging.Handler:
    if path == "-":
        return logging.StreamHandler(sys.stderr)
    return _File(path)


class _File(logging.handlers.WatchedFileHandler):
    """Lines of a file; what cannot be written, on a full disk, is lost without a traceback for each."""

    def _open(self):
        return open(self.baseFilename, self.mode, encoding="utf-8", opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
