"""What an interrupted conversion had finished, so that the next try goes on from there.

A journal maps parts of the work to the ids they became. Whoever reads it checks that the id is in the zoo,
but not that it is what the part becomes: so only what this user wrote, and nobody else may write to, is
believed. It keeps what it names from being removed for a day.
"""

import contextlib
import json
import os
import secrets
import stat
import time
from pathlib import Path

from jblock.zoo import codec, disk
from jblock.zoo.records import ZooError

FOLDER = "journal"
_OLD_FOLDER = "unfinished"  # of zoos of format 1
KEPT_SECONDS = 24 * 3600.0


class Journal:
    """The journal of one piece of work.

    Attributes:
      ids: label of a finished part -> its id.
    """

    def __init__(self, root: Path, key: str):
        """Reads what an earlier try left; nothing if it is damaged.

        Args:
          root: the zoo.
          key: 64 hexadecimal digits that stand for the work, its input included.
        """
        self._path = root / FOLDER / f"{codec.check_id(key)}.json"
        self.ids: dict[str, str] = {}
        with contextlib.suppress(OSError, ZooError):
            self.ids = _read_own(self._path)

    def write(self, scratch: Path) -> None:
        """Puts what is finished on the disk."""
        if not self._path.parent.exists():
            self._path.parent.mkdir(exist_ok=True)
            disk.share(self._path.parent, self._path.parent.parent)
        aside = scratch / secrets.token_hex(8)
        disk.write_new(aside, json.dumps(self.ids).encode())
        aside.chmod(0o644)
        os.replace(aside, self._path)
        disk.fsync_path(self._path.parent)

    def remove(self) -> None:
        """Forgets it: the work is done, or was given up."""
        self._path.unlink(missing_ok=True)


def _read_own(path: Path) -> dict[str, str]:
    """The journal at `path`, if this user wrote it and nobody else may; raises OSError or ZooError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as f:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return {}
        if found.st_mode & 0o022 or found.st_size > codec.RECORD_BYTES:
            return {}
        data = codec.parse_json(f.read(found.st_size), str(path))
    return {str(k): codec.check_id(v) for k, v in data.items()}


def named(root: Path) -> set[str]:
    """The ids that journals of the last day name; removes older journals."""
    found: set[str] = set()
    for folder in (root / FOLDER, root / _OLD_FOLDER):
        for name in os.listdir(folder) if folder.is_dir() else ():
            path = folder / name
            try:
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink(missing_ok=True)
                elif path.suffix == ".json":
                    found.update(str(i) for i in codec.read_json(path).values())
            except (OSError, ZooError):
                continue  # only a hint
    return found
