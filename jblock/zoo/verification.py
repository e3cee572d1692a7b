"""Which hashes are checked when something is loaded, and which files were checked before.

With "once" a file that was checked is remembered by device, inode, size and times, in the user's own cache
folder: whoever writes to the zoo cannot write there, and cannot set the time of an inode's change.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jblock.user_cache import UserCacheError, private_folder
from jblock.zoo.records import DamagedError, ZooError

MODES = ("always", "once", "never")
_MOST_LINES = 1_000_000


class Verification:
    """What a reader of a zoo checks.

    Attributes:
      mode: "always": every load; "once": what was not checked in its present state; "never".
    """

    def __init__(self, mode: str):
        """Raises ZooError for a mode that is not known."""
        if mode not in MODES:
            raise ZooError(f"verify is {mode!r}: give one of {', '.join(MODES)}")
        self.mode = mode
        self._lock = threading.Lock()
        self._known: set[str] | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything is checked at all."""
        return self.mode != "never"

    @contextlib.contextmanager
    def checked(self, id: str, paths: Sequence[Path]) -> Iterator[bool]:
        """Yields whether the content of some files has to be checked, and remembers that it was.

        Raises:
          DamagedError: a file was changed while it was read.
        """
        before = [_state(id, path) for path in paths]
        check = self.mode == "always" or not {*before} <= self._load()
        yield check
        if [_state(id, path) for path in paths] != before:
            raise DamagedError(f"the files of {id} were changed while they were read: run fsck")
        if check and self.mode == "once":
            self._add([state for state in before if state not in self._load()])

    def _load(self) -> set[str]:
        with self._lock:
            if self._known is None:
                self._known = set()
                if self.mode == "once":
                    with contextlib.suppress(OSError, UserCacheError, UnicodeDecodeError):
                        lines = _file().read_text().splitlines()
                        self._known = set(lines[-_MOST_LINES:])
            return self._known

    def _add(self, states: list[str]) -> None:
        with self._lock:
            self._known = (self._known or set()) | set(states)
            # Only a saving of time: where it cannot be kept, files are checked again.
            with contextlib.suppress(OSError, UserCacheError), open(_file(), "a") as f:
                f.write("".join(f"{state}\n" for state in states))


def _file() -> Path:
    return private_folder("verified") / "files"


def _state(id: str, path: Path) -> str:
    found = os.lstat(path)
    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{id} {path.name} {found.st_dev} {found.st_ino} {found.st_size} {times}"
