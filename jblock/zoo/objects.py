"""Reading what is stored by content: components, deltas, and folders of small files."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jblock.zoo import codec, disk, ids, params
from jblock.zoo.records import (
    ComponentRecord,
    DamagedError,
    DeltaRecord,
    NotFoundError,
    ZooError,
)
from jblock.zoo.storage import Storage
from jblock.zoo.verification import Verification

KINDS = ("components", "deltas", "tokenizers", "sources")
_MOST_FILES = 256  # of a tokenizer or of a source


class Objects:
    """The immutable objects of a zoo, named by their content.

    Attributes:
      storage: where they lie.
      verification: which hashes are checked on loading.
    """

    def __init__(self, storage: Storage, verification: Verification | None = None):
        self.storage = storage
        self.verification = verification or Verification("never")
        self._records: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The local folder of the zoo, or of the copies of what was read of it."""
        return self.storage.root

    def component(self, id: str) -> ComponentRecord:
        """The record of a component.

        Raises:
          ZooError: no such component, or its record is damaged.
        """
        return self._record("components", id, codec.component_record)

    def load_component(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """The tensors of a component by the names of its spec, tied ones included.

        Args:
          id: component id.
          verify: recompute the content hash of what is read, and of what it is tied to.

        Raises:
          ZooError: no such component, or it is damaged.
        """
        record = self.component(id)
        tensors = self._load("components", record, verify)
        for name, (component, tensor) in record.refs.items():
            target = self.component(component)
            if tensor not in target.tensors:
                raise DamagedError(
                    f"component {id}: {name!r} refers to {component}/{tensor}: damaged"
                )
            if verify or self.verification.wanted:
                tensors[name] = self._load("components", target, verify)[tensor]
            else:
                tensors[name] = self._load("components", target, verify, only=tensor)[tensor]
        return tensors

    def prefetch(self, id: str) -> None:
        """Asks the kernel to begin reading a component that will be loaded soon."""
        params.prefetch(self.folder("components", id), self.component(id).tensors)

    def load_tensor(self, id: str, name: str) -> np.ndarray:
        """One tensor of a component, tied or not.

        Raises:
          ZooError: no such component or tensor, or it is damaged.
        """
        record = self.component(id)
        if name in record.refs:
            id, name = record.refs[name]
            record = self.component(id)
        if name not in record.tensors:
            raise ZooError(f"component {id} has no tensor {name!r}")
        return self._load("components", record, only=name)[name]

    def read_runs(
        self, id: str, name: str, starts: np.ndarray | list[int], length: int
    ) -> np.ndarray:
        """Runs of elements of one tensor that a component owns; see `params.read_runs`."""
        records = self.component(id).tensors
        with self.reading("components", id) as folder:
            return params.read_runs(folder, records, name, starts, length)

    def check_component(self, record: ComponentRecord) -> None:
        """Recomputes the content hash of a component's own tensors.

        Raises:
          DamagedError: the tensors are damaged.
        """
        self._load("components", record, verify=True)

    def delta(self, id: str) -> DeltaRecord:
        """The record of a delta.

        Raises:
          ZooError: no such delta, or its record is damaged.
        """
        return self._record("deltas", id, codec.delta_record)

    def load_delta(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """The tensors of a delta by the names of its spec.

        Raises:
          ZooError: no such delta, it is damaged, or does not fit its component.
        """
        record = self.delta(id)
        shapes = {name: t.shape for name, t in record.tensors.items()}
        base = self.component(record.component)
        codec.check_shapes(f"delta {id}", shapes, codec.shapes_of(record.spec, base.spec))
        return self._load("deltas", record, verify)

    def files(self, kind: str, id: str) -> dict[str, bytes]:
        """The files of a tokenizer ("tokenizers") or of a source ("sources"), checked by their id.

        Raises:
          ZooError: none of that id, or it is damaged.
        """
        with self.reading(kind, id) as folder:
            return _read_files(folder, id)

    def tokenizer_path(self, id: str) -> Path:
        """The folder of a tokenizer, whose files are checked as `verification` says.

        Raises:
          ZooError: no such tokenizer, or it is damaged.
        """
        folder = self.folder("tokenizers", id)
        if self.verification.wanted:
            with self.reading("tokenizers", id):
                paths = [folder / name for name in sorted(os.listdir(folder))]
                with self.verification.checked(id, paths) as check:
                    if check:
                        self.files("tokenizers", id)
        return folder

    def folder(self, kind: str, id: str) -> Path:
        """The local folder of a component, delta, tokenizer or source.

        Raises:
          ZooError: `id` is no id, or the zoo does not hold it.
        """
        codec.check_id(id)
        return self.storage.fetch(f"{kind}/{id}", lambda path: check_folder(kind, id, path))

    @contextmanager
    def reading(self, kind: str, id: str) -> Iterator[Path]:
        """The folder of something of a kind for as long as files in it are read.

        Raises:
          NotFoundError: the zoo does not hold it, or another process removed it meanwhile.
          UnreadableError: its folder cannot be read.
          ZooError: what the block raises, of a folder that is still there.
        """
        folder = self.folder(kind, id)
        before = _identity(folder)
        try:
            yield folder
        except (ZooError, OSError) as e:
            # Removed by one rename, and perhaps added again.
            if before is None or _identity(folder) != before:
                raise NotFoundError(
                    f"{self.storage.location} has no {kind[:-1]} {id} any more: it was removed while it was "
                    "read"
                ) from e
            if isinstance(e, NotFoundError):
                raise DamagedError(f"{kind[:-1]} {id} lacks a file ({e}): run fsck") from e
            if isinstance(e, OSError):
                raise codec.unreadable(e.filename or folder, e) from e
            raise

    def _record(self, kind: str, id: str, parse: Callable[[str, dict[str, Any]], Any]) -> Any:
        # Immutable, so it is parsed once; that it is still there is asked every time.
        key = (kind, id)
        known = self._records.get(key)
        if known is not None and known[0] == _identity(self.folder(kind, id) / "spec.json"):
            return known[1]
        with self.reading(kind, id) as folder:
            identity = _identity(folder / "spec.json")
            found = parse(id, codec.read_json(folder / "spec.json"))
        with self._lock:
            self._records[key] = (identity, found)
        return found

    def _load(
        self,
        kind: str,
        record: ComponentRecord | DeltaRecord,
        verify: bool = False,
        only: str = "",
    ) -> dict[str, np.ndarray]:
        if not record.tensors and not verify:
            return {}
        with self.reading(kind, record.id) as folder:
            if verify or not self.verification.wanted:
                tensors = params.load(folder, record.tensors, "" if verify else only)
                if verify:
                    check_hash(record.id, codec.header(record), tensors)
                return tensors
            paths = params.files(folder, record.tensors)
            with self.verification.checked(record.id, paths) as check:
                tensors = params.load(folder, record.tensors, "" if check else only)
                if check:
                    check_hash(record.id, codec.header(record), tensors)
            return tensors


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        return disk.identity(path)
    except OSError as e:
        raise codec.unreadable(path, e) from e


def check_hash(id: str, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that a header and tensors are those that an id stands for.

    Raises:
      DamagedError: they are not.
    """
    found = ids.content_id(header, tensors)
    if found != id:
        raise DamagedError(
            f"{id} holds other content than its id says (hash {found}): the zoo is damaged; run "
            "'fsck --repair' and convert the model again"
        )


def check_folder(kind: str, id: str, folder: Path) -> None:
    """Checks that a folder holds what an id stands for, whether or not this version knows its form.

    Raises:
      DamagedError: it does not.
      UnreadableError: it cannot be read.
    """
    if kind in ("tokenizers", "sources"):
        _read_files(folder, id)
        return
    data = codec.read_json(folder / "spec.json")
    try:
        tensors = codec.tensor_records(data)
        header = {k: v for k, v in data.items() if k not in ("tensors", "nbytes")}
    except codec.DAMAGE as e:
        raise DamagedError(f"{folder}/spec.json is damaged ({e}); run fsck") from e
    check_hash(id, header, params.load(folder, tensors))


def _read_files(folder: Path, id: str) -> dict[str, bytes]:
    names = sorted(os.listdir(folder))
    if len(names) > _MOST_FILES:
        raise DamagedError(f"{folder} has {len(names)} files, at most {_MOST_FILES} are read")
    files = {name: codec.read_file(folder / name, codec.RECORD_BYTES) for name in names}
    if ids.files_id(files) != id:
        raise DamagedError(
            f"{folder} holds other content than its id says: convert the model again"
        )
    return files
