"""An engine's process on another host, beside the agent there that starts it."""

import threading
import time
from collections.abc import Callable

from absl import logging

from jblock.hosts import streams
from jblock.hosts.credentials import Credentials
from jblock.hosts.messages import SERVICE, Ended, Here, Said, unpack

_RETRY_SECONDS, _SAY_SECONDS = 0.5, 10.0
# What an agent says of its child holds for so long.
_FRESH_SECONDS = 5.0


class RemoteChild:
    """A `Child` of an agent. While there is no agent at its address, or it belongs to another server, this
    one waits for it."""

    def __init__(self, where: Callable[[], str], credentials: Credentials):
        """Begins to look for it when it is asked for its first frame.

        Args:
          where: gives the agent's address, "host:port", asked before each attempt; it may raise
            ConnectionError where there is none just now.
          credentials: that the agent has to believe.
        """
        self._where, self._credentials = where, credentials
        self._there, self._stop, self._over = (threading.Event() for _ in range(3))
        self._stream: streams.Stream | None = None
        self._address = ""
        self._here, self._heard = Here(0, False), 0.0
        self._ended = Ended("")

    @property
    def pid(self) -> int:
        """See `Child`."""
        return self._here.pid

    @property
    def is_there(self) -> bool:
        """See `Child`."""
        return self._there.is_set()

    @property
    def wants_to_run(self) -> bool:
        """See `Child`."""
        return self._here.wants_to_run and time.monotonic() < self._heard + _FRESH_SECONDS

    def send(self, frame: bytes) -> None:
        """See `Child`; waits until there is an agent."""
        self._there.wait()
        if self._stream is None or self._stop.is_set():
            raise ConnectionError("the agent is gone")
        self._stream.send(frame)

    def receive(self) -> bytes:
        """See `Child`; waits until there is an agent."""
        try:
            if self._stream is None:
                self._stream = self._find()
                self._there.set()
                if self._stop.is_set():
                    self._stream.close()
            while True:
                message = unpack(self._stream.receive())
                if isinstance(message, Said):
                    return message.frame
                if isinstance(message, Ended):
                    self._ended = message
                    raise EOFError(message.how)
                self._take(message)
        except (EOFError, ConnectionError) as error:
            if not self._ended.how:
                self._ended = Ended(f"cannot be heard any more: {error}")
            self.kill()
            self._over.set()
            raise

    def kill(self) -> None:
        """See `Child`: an agent ends the child of a connection that ends."""
        self._stop.set()
        self._there.set()
        if self._stream is not None:
            self._stream.close()

    def end(self, seconds: float) -> None:
        """See `Child`. One that was not found is not looked for any more."""
        if self.is_there:
            self._over.wait(seconds)
        self.kill()
        self._over.wait(seconds)

    def close(self) -> None:
        """See `Child`."""

    def how_it_ended(self) -> tuple[str, str]:
        """See `Child`."""
        return f"agent {self._address}: {self._ended.how}", self._ended.words

    def _take(self, here: Here) -> None:
        self._here, self._heard = here, time.monotonic()

    def _find(self) -> streams.Stream:
        """A stream to an agent that has begun a child.

        Raises:
          ConnectionError: nobody wants it any more.
        """
        say_at = time.monotonic()
        while not self._stop.is_set():
            stream = None
            try:
                self._address = self._where()
                stream = streams.connect(self._address, SERVICE, self._credentials)
                first = unpack(stream.receive())
                if isinstance(first, Here):
                    self._take(first)
                    return stream
                reason = first.how if isinstance(first, Ended) else "it speaks out of turn"
            except ConnectionError as error:
                reason = str(error)
            if stream is not None:
                stream.close()
            if time.monotonic() >= say_at:
                logging.warning("waiting for agent %s: %s", self._address, reason)
                say_at = time.monotonic() + _SAY_SECONDS
            self._stop.wait(_RETRY_SECONDS)
        raise ConnectionError("nobody waits for it any more")
