"""Leases: who is at work in a zoo, who may publish, and what keeps a late one from doing harm.

A lease is a folder of its holder's own under `tmp/`, in which the holder stages what it writes. It is
kept up by touching a file in it, and has expired when that file is old. Ages are differences of times
that one file system gave, so clocks of hosts need not agree; on the host that the holder ran on, the
kernel also tells at once that it is gone, which locks do not across a network.

Breaking an expired lease is renaming its folder away. All that a holder does to the zoo is renaming or
linking out of, or into, its folder, so whoever lost its lease without noticing (a host that slept)
fails at the next step: that is the fence, and there is no gap between a check and what follows it.

The exclusive lock is the highest number in `locks/`, which names a lease; it is free when that lease
is gone. Taking it is making the next number, which a file system gives to one only.

Users of a group may share a zoo: what one leaves behind, another can break without reading it, for only
the parent folders need to be writable. Whoever waits says for whom, and gives up after MAX_WAIT_SECONDS.
"""

import contextlib
import fcntl
import json
import os
import platform
import pwd
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jblock.zoo import codec, disk
from jblock.zoo.records import NotFoundError, ZooError, printable

SECONDS = 60.0
"""How long a lease outlives the last sign of its holder."""

MAX_WAIT_SECONDS = 90.0
"""How long anybody waits for the exclusive lock."""

_HEARTBEATS = 6  # in the life of a lease
_TELL_SECONDS = 2.0  # of waiting, before it is said for whom
_MOST_SECONDS = 3600.0  # that a lease can ask for
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What reading JSON that anybody may have written can raise.
_ODD = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
_MARK = "lease"
_NEW_MARK = "lease.new"
USES = "uses"
"""In a lease: the folder whose file names are the ids its holder relies on."""


class LockedError(ZooError):
    """Another process holds the exclusive lock for longer than anybody waits."""


def tell(text: str) -> None:
    """Says on stderr what a process waits for."""
    print(f"jblock: {text}", file=sys.stderr, flush=True)


class LeaseLostError(ZooError):
    """The holder gave no sign for so long that another one took its place."""


@contextlib.contextmanager
def lease(tmp: Path, seconds: float = SECONDS, purpose: str = "") -> Iterator[Path]:
    """Holds a lease of its own; yields its folder, which is removed at the end whatever happens.

    Args:
      tmp: the zoo's folder of leases.
      seconds: how long it holds without a sign.
      purpose: what its holder does, for those who wait for it.

    Raises:
      LeaseLostError: another one broke it in the meantime.
    """
    folder, fd = _make(tmp, seconds, purpose)
    stop = threading.Event()
    beat = threading.Thread(
        target=_heartbeat, args=(folder / _MARK, seconds / _HEARTBEATS, stop), daemon=True
    )
    beat.start()
    try:
        yield folder
    except FileNotFoundError as e:
        if folder.exists():
            raise
        raise LeaseLostError(
            f"this process stood still for over {seconds:.0f} s and lost its lease on {tmp.parent}: "
            "no model was changed; run the same command again"
        ) from e
    finally:
        stop.set()
        _remove(folder)
        os.close(fd)
        beat.join()


@contextlib.contextmanager
def exclusive(root: Path, purpose: str = "") -> Iterator[Path]:
    """Holds the zoo's exclusive lock, waiting for it if need be; yields the lease's folder.

    Whoever holds it publishes and removes only by renames to and from that folder.

    Raises:
      LockedError: another process held it for MAX_WAIT_SECONDS.
    """
    with lease(root / "tmp", purpose=purpose) as mine:
        _acquire(root, mine)
        yield mine


def clean(tmp: Path) -> int:
    """Breaks leases whose holders are gone and removes what they left; returns how many."""
    try:
        entries, now = sorted(os.listdir(tmp)), _now(tmp)
    except OSError:
        return 0  # not ours to write to
    return sum(_expired(tmp / name, now) and _remove(tmp / name) for name in entries)


def used(tmp: Path) -> set[str]:
    """The ids that leases name."""
    found = set()
    for name in os.listdir(tmp):
        # One that cannot be looked into is of a user with a private umask, who shares nothing.
        with contextlib.suppress(OSError):
            found.update(os.listdir(tmp / name / USES))
    return found


def use(folder: Path, id: str) -> None:
    """Names an id in a lease, so that nobody removes it. Ask whether it is there only afterwards."""
    try:
        (folder / USES / id).touch()
    except FileNotFoundError:
        if not folder.exists():
            raise
        (folder / USES).mkdir(exist_ok=True)
        disk.share(folder / USES, folder.parent)  # others ask for it before they remove
        (folder / USES / id).touch()


def _make(tmp: Path, seconds: float, purpose: str) -> tuple[Path, int]:
    # Before anything is made: who is killed with half a lease leaves it for as long as a lease lives.
    said = json.dumps(
        {
            "host": _host(),
            "seconds": seconds,
            "node": platform.node(),
            "user": user(),
            "pid": os.getpid(),
            "purpose": purpose,
        }
    ).encode()
    while True:
        folder = tmp / secrets.token_hex(8)
        aside = folder.with_suffix(".new")
        aside.mkdir()
        try:
            fd = os.open(aside / _NEW_MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            continue  # a cleaner took it
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, said)
            # Only now is it a mark: one that says whose it is, and whose lock tells that its holder lives.
            os.rename(aside / _NEW_MARK, aside / _MARK)
            disk.share(aside, tmp)
            os.rename(aside, folder)
            return folder, fd
        except FileNotFoundError:
            os.close(fd)
        except BaseException:
            os.close(fd)
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _heartbeat(mark: Path, every: float, stop: threading.Event) -> None:
    while not stop.wait(every):
        try:
            os.utime(mark)
            os.utime(mark.parent)  # what a user who may not read the mark sees
        except FileNotFoundError:
            return  # broken; the holder finds out at its next step
        except OSError:
            continue  # a network that comes back in time is no loss


def _acquire(root: Path, mine: Path) -> None:
    locks = root / "locks"
    locks.mkdir(exist_ok=True)
    wait, begin, told = 0.005, time.monotonic(), ""
    while True:
        number = max(_numbers(locks), default=0)
        holder = _holder(root / "tmp", locks / str(number)) if number else None
        if holder is not None:
            waited = time.monotonic() - begin
            if waited > MAX_WAIT_SECONDS:
                raise LockedError(
                    f"{root} has been locked by {describe(root / 'tmp' / holder)} for "
                    f"{MAX_WAIT_SECONDS:.0f} s: nothing was changed; run the same command again later"
                )
            if waited > _TELL_SECONDS and told != holder:
                tell(
                    f"waiting for {describe(root / 'tmp' / holder)}, at most "
                    f"{MAX_WAIT_SECONDS - waited:.0f} s more"
                )
                told = holder
            time.sleep(wait)
            wait = min(2 * wait, 0.2)
            continue
        try:
            # Not a link, which FUSE and SMB folders may lack. Until its text is in it, it counts as held.
            fd = os.open(locks / str(number + 1), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        try:
            os.write(fd, mine.name.encode())
        finally:
            os.close(fd)
        disk.share(locks / str(number + 1), locks)
        # The highest number is never removed. So if this one is not it, it was passed on and
        # removed in the meantime, and is ours by mistake.
        if max(_numbers(locks), default=0) > number + 1:
            continue
        for old in _numbers(locks):
            if old <= number:
                with contextlib.suppress(OSError):
                    (locks / str(old)).unlink()
        return


def describe(folder: Path) -> str:
    """The holder of a lease, for people."""
    try:
        said = json.loads((folder / _MARK).read_bytes()[:4096])
        what = f" ({said['purpose']})" if said.get("purpose") else ""
        return printable(f"process {said['pid']} of {said['user']} on {said['node']}{what}")
    except (OSError, *_ODD):
        return f"another process (lease {folder.name})"


def user() -> str:
    """The name of the user that this process belongs to."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def _numbers(locks: Path) -> list[int]:
    return [int(n) for n in os.listdir(locks) if n.isdecimal()]


def _holder(tmp: Path, lock: Path) -> str | None:
    """The name of the lease that holds a lock; None when it is free."""
    try:
        found = codec.read_file(lock, 256).decode(errors="replace")
    except NotFoundError:
        return "?"  # passed on in the meantime: look again
    except ZooError:
        found = ""  # of another user with a private umask, or no file
    name = found if _NAME.fullmatch(found) else ""
    if not name:
        # Nobody but its age tells whether it is held: its maker may have died before it wrote.
        with contextlib.suppress(FileNotFoundError):
            return "?" if _now(tmp) - lock.lstat().st_mtime <= SECONDS else None
        return "?"
    if not os.path.lexists(tmp / name):
        return None
    if _expired(tmp / name, _now(tmp)):
        _remove(tmp / name)
    return name if os.path.lexists(tmp / name) else None


def _expired(folder: Path, now: float) -> bool:
    mark, seconds = folder / _MARK, SECONDS
    try:
        # The folder's own time serves where the mark cannot be read, and where there is none: then it is
        # being made, or is a remnant.
        at = folder.lstat().st_mtime
        with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
            # Opened before its time is taken: a network file system then asks the server.
            fd = os.open(mark, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                at = os.fstat(fd).st_mtime
                said = json.loads(os.read(fd, 4096) or b"{}")
                told = float(said.get("seconds", SECONDS))
                seconds = min(told, _MOST_SECONDS) if told >= 0 else SECONDS
                if said.get("host") and said["host"] == _host():
                    # Shared, which reading is enough for: its holder's own is exclusive.
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return True
            finally:
                os.close(fd)
    except BlockingIOError:
        pass  # its holder lives, but may stand still
    except _ODD:
        pass  # half written
    except OSError:
        return False  # gone already
    return now - at > seconds


def _remove(path: Path) -> bool:
    """Breaks a lease in one step, then removes what was in it; whether it was there."""
    gone = path
    if not path.name.startswith("gone-"):
        gone = path.with_name(f"gone-{secrets.token_hex(8)}")
        try:
            os.rename(path, gone)
        except OSError:
            return False
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)
    return True


def _now(tmp: Path) -> float:
    """The time by the clock of the file system."""
    probe = tmp / f"now-{secrets.token_hex(8)}"
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        probe.unlink(missing_ok=True)


def _host() -> str:
    """What processes of one running kernel have in common, containers included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_space() -> str:
    """What tells processes whose numbers can be compared from others: the running kernel, and the container.
    Empty where that cannot be told."""
    try:
        return f"{_host()} {os.readlink('/proc/self/ns/pid')}" if _host() else ""
    except OSError:
        return ""


def has_ended(pid: int) -> bool:
    """Whether there is no process of this number here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # of another user
    return False
