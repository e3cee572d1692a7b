"""Writing so that a crash at any instant leaves what was there before readable.

Everything is written in a private scratch folder (the writer's lease, lease.py), forced to the disk,
and renamed into place.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jblock.zoo.records import ZooError

_AT_ONCE = 8
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = ("No space left", "Disk quota exceeded", "File too large")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk and other failing writes under `path` into a ZooError with a remedy.

    Orbax and its storage library report a full disk as an error of their own type, which is why
    the text is looked at too.
    """
    try:
        yield
    except ZooError:
        raise
    except Exception as e:
        full = isinstance(e, OSError) and e.errno in _FULL
        if full or any(text in str(e) for text in _FULL_TEXT):
            raise ZooError(
                f"no space left to write to {path}: nothing was added; free some space (or raise "
                "the quota or file size limit) and run the same command again"
            ) from e
        if isinstance(e, OSError):
            raise ZooError(f"cannot write to {path}: {e}") from e
        raise


def share(path: Path, like: Path) -> None:
    """Gives a new file or folder, and what is in it, the permissions of the zoo's folder `like`, whatever the
    umask of this process: who may add to a zoo may remove what another user left half done."""
    mode = stat.S_IMODE(os.stat(like).st_mode)
    trees = [(path, (), ())] if not path.is_dir() else os.walk(path)
    for at, _, names in trees:
        for each in (Path(at), *(Path(at, name) for name in names)):
            with contextlib.suppress(OSError):  # of a file system without permissions
                found = os.lstat(each)
                wanted = mode if stat.S_ISDIR(found.st_mode) else mode & 0o666
                if not stat.S_ISLNK(found.st_mode) and stat.S_IMODE(found.st_mode) != wanted:
                    os.chmod(each, wanted)


def check_folder(folder: Path) -> None:
    """Checks that a file system does what a zoo asks of it: a name that is taken is given to nobody else, and
    a folder is renamed in one step.

    Raises:
      ZooError: it does not; the message names a remedy.
    """
    made = folder / f"check-{secrets.token_hex(8)}"
    try:
        (made / "a").mkdir(parents=True)
        (made / "a" / "file").write_bytes(b"")
        os.rename(made / "a", made / "b")
        (made / "c").mkdir()
        try:
            os.rename(made / "c", made / "b")
            raise OSError(errno.ENOTSUP, "a folder was renamed over another one")
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        fsync_path(made)
    except OSError as e:
        if e.errno in (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise
        raise ZooError(
            f"the file system of {folder.parent} cannot hold a zoo ({e.strerror}): it has to rename folders "
            "in one step; use a local disk, NFS or SMB, or give the bucket itself (--zoo s3://...)"
        ) from e
    finally:
        shutil.rmtree(made, ignore_errors=True)


def identity(path: Path) -> tuple[int, int, int, int] | None:
    """What tells a file or folder from one that came in its place; None if there is none."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def fsync_path(path: Path) -> None:
    """Forces one file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_trees(roots: Iterable[Path]) -> None:
    """Forces every file and directory under `roots`, and those themselves, to the disk."""
    paths = []
    for root in roots:
        for folder, _, files in os.walk(root, topdown=False):
            paths += [*(Path(folder, name) for name in files), Path(folder)]
    # Several at once: each waits for the disk's journal, which takes them in together.
    with ThreadPoolExecutor(min(_AT_ONCE, len(paths) or 1)) as pool:
        for _ in pool.map(fsync_path, paths):
            pass


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet and forces it to the disk."""
    with open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def write_atomic(path: Path, data: bytes, scratch: Path) -> None:
    """Replaces `path` in one step: readers see the old bytes or the new ones."""
    aside = scratch / secrets.token_hex(8)
    write_new(aside, data)
    share(aside, path.parent)
    os.replace(aside, path)
    fsync_path(path.parent)


def move_dir(source: Path, target: Path) -> bool:
    """Renames a finished folder into place; the caller forces the parent to the disk.

    Returns:
      False when the target exists: it has the same content, because folders are named by it.
    """
    try:
        os.rename(source, target)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True
