"""A zoo in a bucket: S3, GCS, or memory, through fsspec (extras `s3`, `gcs`). Names are those of a folder.

Objects are written once, and last of their files the one that makes them complete: spec.json, or for folders
of small files a list of them, `files.json`. A pointer is the highest number in a folder of its own, as the
lock is in a folder zoo. Changing it is making the next number on the condition that nobody has, which every
bucket can do: two writers never overwrite each other, and one that was slow finds out.

Components are copied into the user's own cache when they are read, and their hash is checked once then.
"""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jblock.user_cache import UserCacheError, private_folder
from jblock.zoo import codec, lease
from jblock.zoo.lease import LeaseLostError
from jblock.zoo.object_lease import BucketLease
from jblock.zoo.records import DamagedError, NotFoundError, UnreadableError, ZooError
from jblock.zoo.storage import QUARANTINE

_FILES = "files.json"
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
_AT_ONCE = 16


class ObjectStorage:
    """A zoo in a bucket; see `Storage`."""

    def __init__(self, url: str):
        """Raises ZooError where the library for such URLs is not installed, or the URL is none."""
        import fsspec

        self.location = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            # A bucket is shared: what this process listed before may have changed since.
            self._fs, self._base = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        except ImportError as e:
            extra = _EXTRAS.get(scheme)
            remedy = f"pip install 'jblock[{extra}]'" if extra else "install what fsspec names"
            raise ZooError(f"{url}: {e}: {remedy}") from e
        except ValueError as e:
            raise ZooError(f"{url} is no URL of a zoo ({e}): give s3://bucket/folder") from e
        self._base = self._base.rstrip("/")
        digest = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        try:
            self.root = private_folder("zoos", digest)
        except UserCacheError as e:
            raise ZooError(str(e)) from e

    def create(self, zoo_json: bytes) -> None:
        """Puts zoo.json where there is none.

        Raises:
          ZooError: there is no such bucket, or it cannot be written to.
        """
        try:
            with contextlib.suppress(FileExistsError):
                self._put_new("zoo.json", zoo_json)
        except NotFoundError as e:
            raise ZooError(
                f"{self.location} cannot be made: there is no such bucket, or these credentials do not see "
                "it: make the bucket first"
            ) from e

    def names(self, folder: str) -> list[str]:
        """See `Storage`."""
        with self._errors(folder):
            try:
                found = self._fs.ls(self._key(folder), detail=False)
            except FileNotFoundError:
                return []
        keys = {str(path).rstrip("/") for path in found} - {self._key(folder)}
        return sorted(key.rsplit("/", 1)[-1] for key in keys)

    def exists(self, name: str) -> bool:
        """See `Storage`. An object is there when the file is that completes it."""
        with self._errors(name):
            complete = self._completing(name)
            if complete is None:
                return bool(self._fs.exists(self._key(name)))
            return bool(self._fs.isfile(self._key(complete)))

    def read(self, name: str, limit: int = codec.RECORD_BYTES) -> bytes:
        """See `Storage`."""
        with self._errors(name):
            data = bytes(self._fs.cat_file(self._key(name), start=0, end=limit + 1))
        if len(data) > limit:
            raise DamagedError(
                f"{self.location}/{name} has over {limit} bytes, at most so many are read"
            )
        return data

    def read_many(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """See `Storage`. Asks for many at a time."""
        keys = {self._key(name): name for name in names}
        if not keys:
            return {}
        found = self._fs.cat(list(keys), on_error="return")
        return {
            name: data if isinstance(data, bytes) else self._error(data, name)
            for key, name in keys.items()
            for data in [found.get(key, FileNotFoundError(key))]
        }

    def fetch(self, name: str, check: Callable[[Path], None]) -> Path:
        """See `Storage`. What is in the cache was checked when it came there."""
        path = self.root / name
        if path.is_dir():
            return path
        if not self.exists(name):
            kind, _, id_ = name.partition("/")
            raise NotFoundError(
                f"{self.location} has no {kind[:-1]} {id_}: it was removed or never added"
            )
        aside = Path(tempfile.mkdtemp(dir=self._scratch()))
        try:
            for file in self.names(name):
                if "/" in file or file in (".", "..", _FILES):
                    continue
                with self._errors(f"{name}/{file}"):
                    self._fs.get_file(self._key(f"{name}/{file}"), str(aside / file))
            check(aside)
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return path

    def pointer(self, name: str) -> tuple[bytes | None, Any]:
        """See `Storage`. The state is the number that was read."""
        for _ in range(8):
            numbers = self._numbers(name)
            if not numbers:
                return None, 0
            try:
                return self.read(f"{name}/{max(numbers)}"), max(numbers)
            except NotFoundError:
                continue  # passed on and removed meanwhile
        raise UnreadableError(f"{self.location}/{name} changes faster than it can be read")

    def pointers(self, names: Iterable[str]) -> dict[str, bytes | ZooError]:
        """See `Storage`. Lists once and asks for many at a time."""
        newest = dict.fromkeys(names, 0)
        with self._errors("chains"):
            keys = self._fs.find(self._key("chains"))
        for key in keys:
            name, _, number = str(key).removeprefix(f"{self._base}/").rpartition("/")
            if name in newest and number.isdecimal():
                newest[name] = max(newest[name], int(number))
        found = self.read_many(f"{name}/{number}" for name, number in newest.items() if number)
        pointers: dict[str, bytes | ZooError] = {}
        for path, data in found.items():
            name = path.rpartition("/")[0]
            if isinstance(data, NotFoundError):  # passed on meanwhile
                again, _ = self.pointer(name)
                if again is not None:
                    pointers[name] = again
            else:
                pointers[name] = data
        return pointers

    def size(self, name: str) -> int:
        """See `Storage`."""
        with self._errors(name):
            return int(self._fs.du(self._key(name)))

    def modified(self, name: str) -> float:
        """See `Storage`."""
        return max((at for at in self._times(name).values()), default=0.0)

    @contextlib.contextmanager
    def lease(self, purpose: str) -> Iterator[Path]:
        """See `Storage`."""
        scratch = Path(tempfile.mkdtemp(dir=self._scratch()))
        holder = BucketLease(self, scratch.name, purpose)
        try:
            with holder:
                (scratch / "lease").write_text(holder.name)
                yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @contextlib.contextmanager
    def exclusive(self, purpose: str) -> Iterator["ObjectChanges"]:
        """See `Storage`."""
        with BucketLease(self, secrets.token_hex(8), purpose) as holder:
            holder.acquire()
            yield ObjectChanges(self, holder)

    def use(self, scratch: Path, ids: Iterable[str]) -> None:
        """See `Storage`."""
        name = scratch.name
        for id_ in ids:
            with self._errors(id_):
                self._fs.pipe_file(self._key(f"tmp/{name}/uses/{id_}"), b"-")

    def used(self) -> set[str]:
        """See `Storage`."""
        found: set[str] = set()
        with self._errors("tmp"):
            for key in self._fs.find(self._key("tmp")):
                parts = str(key).split("/")
                if len(parts) > 1 and parts[-2] == "uses":
                    found.add(parts[-1])
        return found

    def clean(self) -> None:
        """See `Storage`."""
        with contextlib.suppress(ZooError):
            now = self.now()
            for name in self.names("tmp"):
                if self.expired(name, now):
                    self.delete(f"tmp/{name}")

    def move_in(self, staged: Mapping[str, Path], scratch: Path) -> list[str]:
        """See `Storage`."""
        added = []
        for name, folder in staged.items():
            if self.exists(name):
                continue
            files = sorted(p.name for p in folder.iterdir())
            last = "spec.json" if "spec.json" in files else _FILES
            for file in files:
                if file != last:
                    with self._errors(name):
                        self._fs.put_file(str(folder / file), self._key(f"{name}/{file}"))
            if last == _FILES:
                data = json.dumps(files).encode()
            else:
                data = (folder / last).read_bytes()
            with contextlib.suppress(FileExistsError):
                self._put_new(f"{name}/{last}", data)
                added.append(name)
        return added

    # For leases and changes

    def now(self) -> float:
        """The time by the clock of the bucket."""
        name = f"tmp/now-{secrets.token_hex(8)}"
        self.write(name, b"-")
        try:
            return max(self._times(name).values(), default=time.time())
        finally:
            self.delete(name)

    def expired(self, name: str, now: float) -> bool:
        """Whether a lease's holder gave no sign for too long."""
        times = self._times(f"tmp/{name}")
        return bool(times) and now - max(times.values()) > lease.SECONDS

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, over one that may be there."""
        with self._errors(name):
            self._fs.pipe_file(self._key(name), data)

    def delete(self, name: str) -> None:
        """Removes a file or everything under a name."""
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._key(name), recursive=True)

    def put_new(self, name: str, data: bytes) -> bool:
        """Writes a file that is not there; False where it is."""
        try:
            self._put_new(name, data)
        except FileExistsError:
            return False
        return True

    def numbers(self, name: str) -> list[int]:
        """The numbers in a folder of a pointer or of the lock."""
        return self._numbers(name)

    def move_aside(self, name: str, to: str) -> None:
        """Copies what is under a name to another, then removes it."""
        with self._errors(name):
            for key in self._fs.find(self._key(name)) or [self._key(name)]:
                rest = str(key).removeprefix(self._key(name)).strip("/")
                self._fs.cp_file(key, self._key(f"{to}/{rest}" if rest else to))
        self.delete(name)

    def _put_new(self, name: str, data: bytes) -> None:
        with self._errors(name, FileExistsError):
            self._fs.pipe_file(self._key(name), data, mode="create")

    def _numbers(self, name: str) -> list[int]:
        return [int(n) for n in self.names(name) if n.isdecimal()]

    def _times(self, name: str) -> dict[str, float]:
        with self._errors(name):
            found = self._fs.find(self._key(name), detail=True)
        times = {}
        for key, info in found.items():
            at = info.get("LastModified", info.get("updated", info.get("created")))
            if isinstance(at, str):
                at = datetime.datetime.fromisoformat(at.replace("Z", "+00:00"))
            times[key] = at.timestamp() if isinstance(at, datetime.datetime) else float(at or 0)
        return times

    def _completing(self, name: str) -> str | None:
        kind, _, rest = name.partition("/")
        if not rest or "/" in rest:
            return None
        if kind in ("components", "deltas"):
            return f"{name}/spec.json"
        return f"{name}/{_FILES}" if kind in ("tokenizers", "sources") else None

    def _key(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _scratch(self) -> Path:
        scratch = self.root / "tmp"
        scratch.mkdir(exist_ok=True)
        return scratch

    @contextlib.contextmanager
    def _errors(self, name: str, own: type[Exception] = ZooError) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if isinstance(e, own):
                raise
            raise self._error(e, name) from e

    def _error(self, e: Any, name: str) -> ZooError:
        if isinstance(e, ZooError):
            return e
        if isinstance(e, (FileNotFoundError, KeyError)):
            return NotFoundError(
                f"{self.location}/{name} is not there: it was removed or never added"
            )
        return UnreadableError(
            f"{self.location}/{name} cannot be reached ({' '.join(str(e).split())[:200]}): check the "
            "address, the credentials and the network; nothing says that it is damaged"
        )


class ObjectChanges:
    """Changes in a bucket, each after a look at the lock; see `Changes`."""

    def __init__(self, storage: ObjectStorage, holder: BucketLease):
        self._storage, self._holder = storage, holder

    def put(self, name: str, data: bytes) -> None:
        """See `Changes`."""
        self._holder.check()
        self._storage.write(name, data)

    def point(self, name: str, data: bytes, before: Any) -> None:
        """See `Changes`."""
        self._holder.check()
        if not self._storage.put_new(f"{name}/{before + 1}", data):
            raise LeaseLostError(
                f"{self._storage.location}/{name} was changed by another process: nothing was published; run "
                "the same command again"
            )
        for number in self._storage.numbers(name):
            if number < before:  # one is left to whoever just listed them
                self._storage.delete(f"{name}/{number}")

    def remove(self, name: str) -> None:
        """See `Changes`."""
        self._holder.check()
        # What completes an object goes first: half removed, it is not there.
        complete = self._storage._completing(name)
        if complete is not None:
            self._storage.delete(complete)
        self._storage.delete(name)
        shutil.rmtree(self._storage.root / name, ignore_errors=True)

    def quarantine(self, name: str) -> None:
        """See `Changes`."""
        self._holder.check()
        flat = name.replace("/", "-")
        self._storage.move_aside(name, f"{QUARANTINE}/{flat}.{self._holder.name}")
        shutil.rmtree(self._storage.root / name, ignore_errors=True)
