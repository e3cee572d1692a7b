"""Leases in a bucket, and the lock that one of them holds.

They are small files, kept up by being written again; their age is told by the bucket's clock alone, but for a
process of this host that has ended. A holder that lost the lock cannot publish, for pointers are conditional,
and it looks at the lock before every change.
"""

import contextlib
import json
import os
import threading
import time
from typing import Protocol

from jblock.zoo import codec, lease
from jblock.zoo.lease import LeaseLostError, LockedError
from jblock.zoo.records import NotFoundError, ZooError, printable

_HEARTBEATS = 6  # in the life of a lease
_TELL_SECONDS = 2.0  # of waiting, before it is said for whom


class Bucket(Protocol):
    """What leases need of a bucket; see `ObjectStorage`."""

    location: str

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small file."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, over one that may be there."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Writes a file if there is none of that name; whether it did."""

    def delete(self, name: str) -> None:
        """Removes a file or everything under a name."""

    def numbers(self, name: str) -> list[int]:
        """The numbers in a folder of a pointer or of the lock."""

    def now(self) -> float:
        """The time by the clock of the bucket."""

    def expired(self, name: str, now: float) -> bool:
        """Whether a lease's holder gave no sign for too long."""


class BucketLease:
    """A lease in a bucket, and the lock that it may hold."""

    def __init__(self, storage: Bucket, name: str, purpose: str):
        self.name = name
        self._storage, self._seen = storage, time.monotonic()
        self._said = json.dumps(
            {
                "user": lease.user(),
                "pid": os.getpid(),
                "node": os.uname().nodename,
                "space": lease.process_space(),
                "purpose": purpose,
            }
        ).encode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True)
        self._number = 0

    def __enter__(self) -> "BucketLease":
        self._storage.write(f"tmp/{self.name}/lease", self._said)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(ZooError):
            self._storage.delete(f"tmp/{self.name}")

    def check(self) -> None:
        """Raises LeaseLostError where the lease may have been broken, or the lock passed on."""
        late = time.monotonic() - self._seen > lease.SECONDS / 2
        numbers = self._storage.numbers("locks")
        if late or max(numbers, default=0) != self._number:
            raise LeaseLostError(
                f"this process stood still for too long and lost its lease on {self._storage.location}: no "
                "model was changed; run the same command again"
            )

    def acquire(self) -> None:
        """Takes the exclusive lock, waiting for it if need be; as in lease.py."""
        begin, told, wait = time.monotonic(), "", 0.05
        while True:
            number = max(self._storage.numbers("locks"), default=0)
            holder = self._held(number) if number else ""
            if holder:
                waited = time.monotonic() - begin
                if waited > lease.MAX_WAIT_SECONDS:
                    raise LockedError(
                        f"{self._storage.location} has been locked by {self._describe(holder)} for "
                        f"{lease.MAX_WAIT_SECONDS:.0f} s: nothing was changed; run the same command again"
                    )
                if waited > _TELL_SECONDS and told != holder:
                    left = lease.MAX_WAIT_SECONDS - waited
                    lease.tell(f"waiting for {self._describe(holder)}, at most {left:.0f} s more")
                    told = holder
                time.sleep(wait)
                wait = min(2 * wait, 1.0)
                continue
            if not self._storage.put_new(f"locks/{number + 1}", self.name.encode()):
                continue
            if max(self._storage.numbers("locks"), default=0) > number + 1:
                continue
            self._number = number + 1
            for old in self._storage.numbers("locks"):
                if old <= number:
                    self._storage.delete(f"locks/{old}")
            return

    def _held(self, number: int) -> str:
        try:
            holder = self._storage.read(f"locks/{number}", 256).decode(errors="replace")
            said = self._storage.read(f"tmp/{holder}/lease", 4096)
        except NotFoundError:
            return ""
        if _of_ended(said) or self._storage.expired(holder, self._storage.now()):
            self._storage.delete(f"tmp/{holder}")
            return ""
        return holder

    def _describe(self, holder: str) -> str:
        try:
            said = json.loads(self._storage.read(f"tmp/{holder}/lease", 4096))
            text = f"process {said['pid']} of {said['user']} on {said['node']} ({said['purpose']})"
            return printable(text)
        except (ZooError, *codec.DAMAGE):
            return f"another process (lease {holder})"

    def _heartbeat(self) -> None:
        while not self._stop.wait(lease.SECONDS / _HEARTBEATS):
            try:
                self._storage.read(f"tmp/{self.name}/lease", 4096)
                self._storage.write(f"tmp/{self.name}/lease", self._said)
                self._seen = time.monotonic()
            except NotFoundError:
                self._seen = -1e9  # broken: `check` tells
                return
            except ZooError:
                continue  # a network that comes back in time is no loss


def _of_ended(said: bytes) -> bool:
    """Whether a lease is of a process of this host that has ended."""
    try:
        found = json.loads(said)
        here = found["space"] and found["space"] == lease.process_space()
        return bool(here) and type(found["pid"]) is int and lease.has_ended(found["pid"])
    except codec.DAMAGE:
        return False  # of an older version
