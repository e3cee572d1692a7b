"""The process that an engine runs in, as whoever speaks with it sees it."""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Protocol

# A step on CPU reads weights and KV from end to end. glibc then asks Linux for pages of 2 MB for them, which
# most systems give only where asked (transparent_hugepage "madvise"); other C libraries ignore it.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Child(Protocol):
    """A process that takes frames of `wire` and gives some, here or on another host. `send` is called by one
    thread and `receive` by one."""

    @property
    def pid(self) -> int:
        """Its process id, on its own host; 0: there is none yet."""
        ...

    @property
    def is_there(self) -> bool:
        """Whether it has begun, so that its silence means something."""
        ...

    @property
    def wants_to_run(self) -> bool:
        """Whether a thread of it runs, waits for a processor or for a disk."""
        ...

    def send(self, frame: bytes) -> None:
        """Sends a frame.

        Raises:
          OSError: it is gone.
        """
        ...

    def receive(self) -> bytes:
        """The next frame.

        Raises:
          EOFError, OSError: it is gone.
        """
        ...

    def kill(self) -> None:
        """Ends it, whatever it does."""
        ...

    def end(self, seconds: float) -> None:
        """Waits for it to end by itself, and after so many seconds ends it."""
        ...

    def close(self) -> None:
        """Frees what is left of it here, once nobody sends or receives any more."""
        ...

    def how_it_ended(self) -> tuple[str, str]:
        """What ended it, once `receive` has failed, and what it said last ("" if nothing)."""
        ...


class LocalChild:
    """A `Child` on this machine: `jblock.engine.process.server` at the other end of a pipe. What it writes to
    its stderr is passed on to ours."""

    is_there = True

    def __init__(self) -> None:
        """Starts it."""
        self._stderr: collections.deque[str] = collections.deque(maxlen=20)
        self._connection, theirs = Pipe()
        with theirs:
            self._process = _spawn(theirs)
        self._thread = threading.Thread(
            target=self._pass_stderr_on, name="engine-stderr", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        """See `Child`."""
        return self._process.pid

    @property
    def wants_to_run(self) -> bool:
        """See `Child`. One that is stopped, or whose threads all sleep, does not; False where the system does
        not say."""
        try:
            threads = os.listdir(f"/proc/{self.pid}/task")
        except OSError:
            return False
        for thread in threads:
            path = f"/proc/{self.pid}/task/{thread}/stat"
            with contextlib.suppress(OSError), open(path) as file:
                if file.read().rpartition(")")[2].split()[0] in "RD":
                    return True
        return False

    def send(self, frame: bytes) -> None:
        """See `Child`."""
        self._connection.send_bytes(frame)

    def receive(self) -> bytes:
        """See `Child`."""
        return self._connection.recv_bytes()

    def kill(self) -> None:
        """See `Child`."""
        self._process.kill()

    def end(self, seconds: float) -> None:
        """See `Child`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(1.0)

    def close(self) -> None:
        """See `Child`."""
        self._connection.close()

    def how_it_ended(self) -> tuple[str, str]:
        """See `Child`."""
        code = self._process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"exited with code {code}"
        self._thread.join(1.0)  # Its last words may still be in the pipe.
        words = next((s for s in reversed(self._stderr) if s.strip()), "")
        return f"engine process {self.pid} {how}", words.strip()

    def _pass_stderr_on(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace")
            self._stderr.append(text)
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):
                continue  # Ours is closed; keep reading so that the child never blocks.


def _spawn(theirs: Connection) -> subprocess.Popen[bytes]:
    """Starts the child with one end of the pipe, our import path and a session of its own."""
    # -P and an explicit path: the child imports what we import, not what lies in its folder.
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "jblock.engine.process.server", str(theirs.fileno())],
        env={**_HUGE_PAGES, **os.environ, "PYTHONPATH": path},
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Ctrl-C goes to a terminal's whole group; only the parent is to act on it.
        start_new_session=True,
    )
