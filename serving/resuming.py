"""Calls of a client that outlive the server they were made to."""

import dataclasses
import secrets
import time

from serving.v1 import jblock_pb2 as pb
from serving.values import Chunk, ClientError, Usage

# Seconds between two tries: the first, and the most, each twice the one before.
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
# What a call ends with when its server does; grpc says CANCELLED of one that the server had not looked at.
_SERVER_ENDED = ("UNAVAILABLE", "CANCELLED")


class ResumableCall:
    """One call, tried again while its server is away: a stream goes on after the tokens that it has.

    Attributes:
      request: what to send now.
    """

    def __init__(self, request: pb.GenerateRequest, seconds: float, timeout: float | None):
        """`seconds` is how long it waits for a server that is gone; `timeout` is of all tries together."""
        self.request = request
        self._seconds = seconds if request.n <= 1 else 0.0
        self._begin = time.monotonic()
        self._timeout = timeout
        self._lost_at: float | None = None
        self._loss: ClientError | None = None
        self._wait = _FIRST_WAIT
        self._token_ids: list[int] = list(request.resume.token_ids)
        self._resumed = 0  # How many of them the server was told of.
        self._first: float | None = None
        if self._seconds and request.temperature and not request.HasField("seed"):
            request.seed = secrets.randbits(32)  # Or draws would go on otherwise.

    @property
    def timeout(self) -> float | None:
        """Seconds that are left of the whole call."""
        if self._timeout is None:
            return None
        return max(0.0, self._timeout - (time.monotonic() - self._begin))

    def take(self, chunk: Chunk) -> Chunk:
        """What the server sent, as one that never ended would have."""
        self._lost_at, self._wait = None, _FIRST_WAIT
        self._token_ids += chunk.token_ids
        now = time.monotonic() - self._begin
        if self._first is None and chunk.token_ids:
            self._first = now
        self.request.resume.model_version = chunk.model_version
        if chunk.usage is None or not self._resumed:
            return chunk
        usage = Usage(
            prompt_tokens=chunk.usage.prompt_tokens,
            completion_tokens=chunk.usage.completion_tokens + self._resumed,
            time_to_first_token=self._first or 0.0,
            total_time=now,
        )
        return dataclasses.replace(chunk, usage=usage)

    def wait_after(self, error: ClientError, reached: bool) -> float:
        """Seconds until the call may be tried again.

        Args:
          error: how it ended.
          reached: the server has answered this client before, so it is there at times.

        Raises:
          ClientError: the error, where trying again is of no use; the first, where none came back.
        """
        now = time.monotonic()
        began = bool(self._token_ids) or self._lost_at is not None
        # What a server says itself before anything came is meant: it is full, or warming up.
        if error.code not in _SERVER_ENDED or not (began or (reached and not error.by_server)):
            raise error
        if self._lost_at is None:
            self._lost_at, self._loss = now, error
        if now + self._wait > self._lost_at + self._seconds:
            raise self._loss or error
        wait, self._wait = self._wait, min(2 * self._wait, _LONGEST_WAIT)
        self.request.resume.token_ids[:] = self._token_ids
        self._resumed = len(self._token_ids)
        return wait
