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
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jblock.zoo.records import ZooError

SECONDS = 60.0
"""How long a lease outlives the last sign of its holder."""

_SIGNS = 6  # in the life of a lease
_MARK = "lease"
USES = "uses"
"""In a lease: the folder whose file names are the ids its holder relies on."""


class LeaseLostError(ZooError):
    """The holder gave no sign for so long that another one took its place."""


@contextlib.contextmanager
def lease(tmp: Path, seconds: float = SECONDS) -> Iterator[Path]:
    """Holds a lease of its own; yields its folder, which is removed at the end whatever happens.

    Args:
      tmp: the zoo's folder of leases.
      seconds: how long it holds without a sign.

    Raises:
      LeaseLostError: another one broke it in the meantime.
    """
    folder, fd = _make(tmp, seconds)
    stop = threading.Event()
    beat = threading.Thread(
        target=_keep_up, args=(folder / _MARK, seconds / _SIGNS, stop), daemon=True
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
def exclusive(root: Path) -> Iterator[Path]:
    """Holds the zoo's exclusive lock, waiting for it if need be; yields the lease's folder.

    Whoever holds it publishes and removes only by renames and links to and from that folder.
    """
    with lease(root / "tmp") as mine:
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
        (folder / USES / id).touch()


def _make(tmp: Path, seconds: float) -> tuple[Path, int]:
    # Before anything is made: who is killed with half a lease leaves it for as long as a lease lives.
    said = json.dumps({"host": _host(), "seconds": seconds}).encode()
    while True:
        folder = tmp / secrets.token_hex(8)
        aside = folder.with_suffix(".new")
        aside.mkdir()
        try:
            fd = os.open(aside / _MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            continue  # a cleaner took it
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, said)
            os.rename(aside, folder)
            return folder, fd
        except FileNotFoundError:
            os.close(fd)
        except BaseException:
            os.close(fd)
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _keep_up(mark: Path, every: float, stop: threading.Event) -> None:
    while not stop.wait(every):
        try:
            os.utime(mark)
        except FileNotFoundError:
            return  # broken; the holder finds out at its next step
        except OSError:
            continue  # a network that comes back in time is no loss


def _acquire(root: Path, mine: Path) -> None:
    locks, token = root / "locks", mine / "token"
    locks.mkdir(exist_ok=True)
    token.write_text(mine.name)
    wait = 0.005
    while True:
        number = max(_numbers(locks), default=0)
        if number and _held(root / "tmp", locks / str(number)):
            time.sleep(wait)
            wait = min(2 * wait, 0.2)
            continue
        try:
            os.link(token, locks / str(number + 1))
        except FileExistsError:
            continue
        # The highest number is never removed. So if this one is not it, it was passed on and
        # removed in the meantime, and is ours by mistake.
        if max(_numbers(locks)) > number + 1:
            continue
        for old in _numbers(locks):
            if old <= number:
                with contextlib.suppress(OSError):
                    (locks / str(old)).unlink()
        return


def _numbers(locks: Path) -> list[int]:
    return [int(n) for n in os.listdir(locks) if n.isdecimal()]


def _held(tmp: Path, lock: Path) -> bool:
    try:
        holder = tmp / Path(lock.read_text()).name
    except FileNotFoundError:
        return True  # passed on in the meantime: look again
    if not holder.exists():
        return False
    if _expired(holder, _now(tmp)):
        _remove(holder)
    return holder.exists()


def _expired(folder: Path, now: float) -> bool:
    mark = folder / _MARK
    try:
        # Without a mark it is being made, or is a remnant.
        at = (mark if mark.exists() else folder).lstat().st_mtime
        seconds = SECONDS
        if mark.exists():
            fd = os.open(mark, os.O_RDWR | os.O_NOFOLLOW)
            try:
                said = json.loads(os.read(fd, 4096) or b"{}")
                seconds = min(max(float(said.get("seconds", SECONDS)), 0.0), 3600.0)
                if said.get("host") and said["host"] == _host():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
            finally:
                os.close(fd)
    except BlockingIOError:
        pass  # its holder lives, but may stand still
    except (ValueError, TypeError, AttributeError):
        pass  # half written
    except OSError:
        return False  # gone already, or not ours
    return now - at > seconds


def _remove(path: Path) -> bool:
    """Breaks a lease in one step, then removes what was in it; whether it was there."""
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
