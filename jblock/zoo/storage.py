"""Where a zoo's files lie: a folder (this file) or a bucket (object_storage.py), behind one small interface.

Names are relative to the zoo and have slashes. Objects (components, deltas, tokenizers, sources, versions,
edges) are written once. A pointer, one a model, is replaced in one step. Everything is added from a lease,
whose folder is on a local disk; what removes, and what puts pointers, holds the exclusive lock.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jblock.zoo import codec, disk, lease
from jblock.zoo.records import DamagedError, NotFoundError, ZooError

QUARANTINE = "quarantine"


class Changes(Protocol):
    """What the holder of the exclusive lock may do. Each fails if the lock was lost meanwhile."""

    def put(self, name: str, data: bytes) -> None:
        """Writes a file, in one step, over one that may be there."""

    def point(self, name: str, data: bytes, before: Any) -> None:
        """Replaces a pointer that `Storage.pointer` gave with the state `before`.

        Raises:
          LeaseLostError: it is not in that state any more.
        """

    def remove(self, name: str) -> None:
        """Removes a file or folder."""

    def quarantine(self, name: str) -> None:
        """Moves a file or folder out of the way, into `quarantine/`."""


class Storage(Protocol):
    """Where a zoo's files lie.

    Attributes:
      location: path or URL, for people.
      root: the local folder in which `fetch` puts things: the zoo itself, or a copy of some of it.
    """

    location: str
    root: Path

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""

    def read(self, name: str, limit: int = codec.RECORD_BYTES) -> bytes:
        """The bytes of a small file.

        Raises:
          NotFoundError, DamagedError, UnreadableError: see `codec.read_file`.
        """

    def read_many(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """The bytes of small files, or why one cannot be read."""

    def fetch(self, name: str, check: Callable[[Path], None]) -> Path:
        """The local folder with the files of an object. A copy is checked before it is used.

        Raises:
          NotFoundError: there is none.
        """

    def pointer(self, name: str) -> tuple[bytes | None, Any]:
        """The bytes of a pointer, None where there is none, and its state for `Changes.point`."""

    def pointers(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """The bytes of many pointers, or why one cannot be read; those that are not there are left out."""

    def size(self, name: str) -> int:
        """Bytes of the files of an object."""

    def modified(self, name: str) -> float:
        """When an object was written at the latest, in seconds since 1970; 0 where that is unknown."""

    def lease(self, purpose: str) -> contextlib.AbstractContextManager[Path]:
        """See `lease.lease`."""

    def exclusive(self, purpose: str) -> contextlib.AbstractContextManager[Changes]:
        """See `lease.exclusive`."""

    def use(self, scratch: Path, ids: Iterable[str]) -> None:
        """Names ids in a lease, so that nobody removes them. Ask whether they are there only afterwards."""

    def used(self) -> set[str]:
        """The ids that leases name."""

    def clean(self) -> None:
        """Removes what leases of processes that are gone left."""

    def move_in(self, staged: Mapping[str, Path], scratch: Path) -> list[str]:
        """Moves finished folders of a lease to their names, on the disk for good; returns those that were
        not there before."""


class FolderStorage:
    """A zoo in a folder; see `Storage`."""

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root)
        self._checked = False

    def names(self, folder: str) -> list[str]:
        """See `Storage`."""
        try:
            return sorted(os.listdir(self._inside(folder)))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise codec.unreadable(self.root / folder, e) from e

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        return os.path.lexists(self.root / name)

    def read(self, name: str, limit: int = codec.RECORD_BYTES) -> bytes:
        """See `Storage`."""
        return codec.read_file(self._inside(name), limit)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """See `Storage`."""
        found: dict[str, bytes | ZooError] = {}
        known: dict[str, str] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            try:
                found[name] = codec.read_file(f"{self._folder(folder, known)}/{file}")
            except ZooError as e:
                found[name] = e
        return found

    def fetch(self, name: str, check: Callable[[Path], None]) -> Path:
        """See `Storage`."""
        path = self._inside(name)
        if not path.is_dir():
            kind, _, id_ = name.partition("/")
            raise NotFoundError(
                f"{self.location} has no {kind[:-1]} {id_}: it was removed or never added"
            )
        return path

    def pointer(self, name: str) -> tuple[bytes | None, Any]:
        """See `Storage`. The lock makes the state of a local pointer needless."""
        try:
            return self.read(name), None
        except NotFoundError:
            return None, None

    def pointers(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """See `Storage`."""
        found = self.read_many(names)
        return {n: data for n, data in found.items() if not isinstance(data, NotFoundError)}

    def size(self, name: str) -> int:
        """See `Storage`."""
        path = self.root / name
        if not path.is_dir():
            return os.lstat(path).st_size
        return sum(
            os.lstat(os.path.join(at, f)).st_size for at, _, files in os.walk(path) for f in files
        )

    def modified(self, name: str) -> float:
        """See `Storage`."""
        return os.lstat(self.root / name).st_mtime

    @contextlib.contextmanager
    def lease(self, purpose: str) -> Iterator[Path]:
        """See `Storage`."""
        if not self._checked:
            disk.check_folder(self.root / "tmp")
            self._checked = True
        with lease.lease(self.root / "tmp", purpose=purpose) as scratch:
            yield scratch

    @contextlib.contextmanager
    def exclusive(self, purpose: str) -> Iterator["FolderChanges"]:
        """See `Storage`."""
        with disk.disk_errors(self.root), lease.exclusive(self.root, purpose) as scratch:
            yield FolderChanges(self, scratch)

    def use(self, scratch: Path, ids: Iterable[str]) -> None:
        """See `Storage`."""
        for id_ in ids:
            lease.use(scratch, id_)

    def used(self) -> set[str]:
        """See `Storage`."""
        return lease.used(self.root / "tmp")

    def clean(self) -> None:
        """See `Storage`."""
        lease.clean(self.root / "tmp")

    def move_in(self, staged: Mapping[str, Path], scratch: Path) -> list[str]:
        """See `Storage`."""
        disk.fsync_trees(staged.values())
        added = []
        for name, folder in staged.items():
            target = self.root / name
            disk.share(folder, target.parent)
            if disk.move_dir(folder, target):
                added.append(name)
        for parent in {(self.root / name).parent for name in staged}:
            disk.fsync_path(parent)
        return added

    def _inside(self, name: str) -> Path:
        """The path of a name; what lies behind a link is none of the zoo."""
        return Path(self._folder(name, {}))

    def _folder(self, name: str, known: dict[str, str]) -> str:
        """The same as text; `known` keeps what was looked at."""
        if name not in known:
            above, _, last = name.rpartition("/")
            at = f"{self._folder(above, known) if above else self.root}/{last}"
            if last in ("", ".", "..") or os.path.islink(at):
                raise DamagedError(
                    f"{at} is a link: a zoo holds everything itself; replace it by a copy"
                )
            known[name] = at
        return known[name]


class FolderChanges:
    """Changes by renames out of, and into, the folder of the lock's lease; see `Changes`."""

    def __init__(self, storage: FolderStorage, scratch: Path):
        self._root, self.scratch = storage.root, scratch

    def put(self, name: str, data: bytes) -> None:
        """See `Changes`."""
        path = self._root / name
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            disk.share(path.parent, path.parent.parent)
            disk.fsync_path(path.parent.parent)
        disk.write_atomic(path, data, self.scratch)

    def point(self, name: str, data: bytes, before: Any) -> None:
        """See `Changes`."""
        self.put(name, data)

    def remove(self, name: str) -> None:
        """See `Changes`."""
        path = self._root / name
        os.rename(path, self.scratch / f"removed-{name.replace('/', '-')}")
        disk.fsync_path(path.parent)

    def quarantine(self, name: str) -> None:
        """See `Changes`."""
        path, aside = self._root / name, self._root / QUARANTINE
        if not aside.exists():
            aside.mkdir(exist_ok=True)
            disk.share(aside, self._root)
        flat = name.replace("/", "-")
        # By way of the lease, which is the fence.
        os.rename(path, self.scratch / flat)
        os.rename(self.scratch / flat, aside / f"{flat}.{self.scratch.name}")
        disk.fsync_path(path.parent)
