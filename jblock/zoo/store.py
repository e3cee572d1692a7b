"""The zoo on disk: content-addressed components and deltas, and the chains that name them.

    zoo.json                        format version
    components/<id>/                spec.json, params/ (orbax); immutable
    deltas/<id>/                    the same, naming the component they apply to
    tokenizers/<id>/                tokenizer.json and its companions
    sources/<id>/                   small files of a checkpoint as they were, for export
    chains/<name>/<version>.json    immutable; chains/<name>/current holds the live version
    partition/current.json          blocks of the live chains; derived, replaceable
    edges/<id>.json                 what was measured of substitutes (edges.py); immutable
    tmp/                            leases, each the scratch folder of a process at work
    locks/                          whose turn it is to publish or remove
    unfinished/                     what interrupted conversions had finished

Reading needs no lock: everything under a final name is complete.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jblock.blocks.delta_spec import DeltaSpec
from jblock.blocks.spec import ComponentSpec, canonical_json
from jblock.zoo import codec, disk, ids, latency_profiles, lease, params, partition
from jblock.zoo.journal import Journal
from jblock.zoo.records import (
    Chain,
    ComponentRecord,
    DeltaRecord,
    NotFoundError,
    TensorRecord,
    ZooError,
    check_name,
)
from jblock.zoo.writer import Writer

FORMAT = 1
FOLDERS = (
    "components",
    "deltas",
    "tokenizers",
    "sources",
    "chains",
    "partition",
    "edges",
    "tmp",
    "locks",
)
_VERSION_FILE = re.compile(r"([1-9][0-9]{0,8})\.json")


class Zoo:
    """One zoo. Make it with `Zoo.create` or `Zoo.open`.

    Attributes:
      path: its folder, links resolved.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: str | os.PathLike) -> "Zoo":
        """Makes an empty zoo, or opens the one that is there.

        Raises:
          ZooError: the folder holds something else, or cannot be written.
        """
        root = Path(path)
        if (root / "zoo.json").exists():
            return cls.open(root)
        with disk.disk_errors(root):
            # A writer killed in here leaves only folders of these names, and no zoo.json.
            ours = {*FOLDERS, "zoo.json", "lost+found"}
            if root.exists() and not set(os.listdir(root)) <= ours:
                raise ZooError(f"{root} holds something else than a zoo: give an empty folder")
            for folder in FOLDERS:
                (root / folder).mkdir(parents=True, exist_ok=True)
            disk.fsync_path(root)
            with lease.lease(root / "tmp") as scratch:
                data = canonical_json({"format": FORMAT}) + "\n"
                disk.write_atomic(root / "zoo.json", data.encode(), scratch)
        return cls.open(root)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Zoo":
        """Opens a zoo for reading and adding.

        Raises:
          ZooError: there is no zoo, or it is of a format this version does not know.
        """
        try:
            root = Path(path).resolve(strict=True)
            found = json.loads((root / "zoo.json").read_bytes())
        except FileNotFoundError as e:
            raise ZooError(
                f"{path} is not a zoo (no zoo.json): make one with 'jblock-convert hf SRC --zoo "
                f"{path} --name NAME'"
            ) from e
        except (OSError, ValueError) as e:
            raise ZooError(f"{path}/zoo.json cannot be read: {e}") from e
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ZooError(f"{path}/zoo.json says {found!r}; this version reads format {FORMAT}")
        return cls(root)

    # Components and deltas

    def component(self, id: str) -> ComponentRecord:
        """The record of a component.

        Raises:
          ZooError: no such component, or its record is damaged.
        """
        return codec.component_record(id, self._record("components", id))

    def load_component(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """The tensors of a component by the names of its spec, tied ones included.

        Args:
          id: component id.
          verify: recompute the content hash of what is read, and of what it is tied to.

        Raises:
          ZooError: no such component, or it is damaged.
        """
        record = self.component(id)
        tensors = self._load("components", id, record.tensors)
        if verify:
            self._verify(id, codec.component_header(record), tensors)
        for name, (component, tensor) in record.refs.items():
            target = self.component(component)
            if tensor not in target.tensors:
                raise ZooError(f"component {id}: {name!r} refers to {component}/{tensor}: damaged")
            if verify:
                self.check_component(target)
            only = {tensor: target.tensors[tensor]}
            tensors[name] = self._load("components", component, only)[tensor]
        return tensors

    def prefetch(self, id: str) -> None:
        """Asks the kernel to begin reading a component that will be loaded soon."""
        params.prefetch(self.folder("components", id) / "params", self.component(id).tensors)

    def load_tensor(self, id: str, name: str) -> np.ndarray:
        """One tensor of a component, tied or not.

        Raises:
          ZooError: no such component or tensor, or it is damaged.
        """
        record = self.component(id)
        if name in record.refs:
            return self.load_tensor(*record.refs[name])
        if name not in record.tensors:
            raise ZooError(f"component {id} has no tensor {name!r}")
        return self._load("components", id, {name: record.tensors[name]})[name]

    def check_component(self, record: ComponentRecord) -> None:
        """Recomputes the content hash of a component's own tensors.

        Raises:
          ZooError: the tensors are damaged.
        """
        tensors = self._load("components", record.id, record.tensors)
        self._verify(record.id, codec.component_header(record), tensors)

    def delta(self, id: str) -> DeltaRecord:
        """The record of a delta.

        Raises:
          ZooError: no such delta, or its record is damaged.
        """
        return codec.delta_record(id, self._record("deltas", id))

    def load_delta(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """The tensors of a delta by the names of its spec.

        Raises:
          ZooError: no such delta, or it is damaged.
        """
        record = self.delta(id)
        tensors = self._load("deltas", id, record.tensors)
        if verify:
            self._verify(id, codec.delta_header(record), tensors)
        return tensors

    # Adding

    @contextmanager
    def writer(self, key: str | None = None) -> Iterator[Writer]:
        """Stages additions; all have entered the zoo when the block ends without an error.

        Args:
          key: 64 hexadecimal digits that stand for the work, if a killed try shall be gone on with.

        Raises:
          ZooError: a full disk, or no permission to write.
        """
        journal = Journal(self.path, key) if key else None
        writer = None
        with disk.disk_errors(self.path):
            lease.clean(self.path / "tmp")
            try:
                with lease.lease(self.path / "tmp") as scratch:
                    writer = Writer(self, scratch, journal)
                    yield writer
                    writer.commit()
            except NotFoundError:
                raise  # the same work again adds what is missing
            except Exception:
                if writer is not None:
                    writer.undo()
                raise

    def put_component(
        self,
        spec: ComponentSpec,
        tensors: Mapping[str, np.ndarray],
        refs: Mapping[str, tuple[str, str]] | None = None,
    ) -> str:
        """Adds one component; see `Writer.put_component`."""
        with self.writer() as writer:
            return writer.put_component(spec, tensors, refs)

    def put_delta(self, spec: DeltaSpec, component: str, tensors: Mapping[str, np.ndarray]) -> str:
        """Adds one delta; see `Writer.put_delta`."""
        with self.writer() as writer:
            return writer.put_delta(spec, component, tensors)

    def put_tokenizer(self, files: Mapping[str, bytes]) -> str:
        """Adds the files of a tokenizer; returns its id."""
        with self.writer() as writer:
            return writer.put_files("tokenizers", files)

    def files(self, kind: str, id: str) -> dict[str, bytes]:
        """The files of a tokenizer ("tokenizers") or of a source ("sources"), checked by their id.

        Raises:
          ZooError: none of that id, or it is damaged.
        """
        files = {}
        with self.reading(kind, id) as folder:
            for name in sorted(os.listdir(folder)):
                path = folder / name
                if path.is_symlink() or not path.is_file():
                    raise ZooError(f"{path} is no regular file: remove it")
                files[name] = path.read_bytes()
            if ids.files_id(files) != id:
                raise ZooError(
                    f"{folder} holds other content than its id says: convert the model again"
                )
        return files

    def tokenizer_path(self, id: str) -> Path:
        """The folder of a tokenizer.

        Raises:
          ZooError: no such tokenizer.
        """
        return self.folder("tokenizers", id)

    def publish(self, chain: Chain) -> Chain:
        """Makes `chain` the live version of its name and returns it with its version.

        The version is a new one, unless the zoo has an equal version already: that one goes live.

        Raises:
          NotFoundError: the chain names something the zoo does not hold (any more).
          ZooError: what it names does not fit, or the disk is full.
        """
        self.check_chain(chain)
        with disk.disk_errors(self.path), lease.exclusive(self.path) as mine:
            self.check_chain(chain)  # again: nothing is removed from here on
            base, _, number = (chain.base or "").rpartition("@")
            if base and int(number) not in self.versions(base):
                raise NotFoundError(f"{self.path} has no model {chain.base}: it was removed")
            folder = self._inside(self.path / "chains" / chain.name)
            folder.mkdir(exist_ok=True)
            disk.fsync_path(folder.parent)
            published = self._add_version(chain, folder, mine)
            live = f"{published.version}\n".encode()
            disk.write_atomic(folder / "current", live, mine)
            self.write_partition(mine)
        return published

    def check_chain(self, chain: Chain) -> None:
        """Checks that everything a chain names is there and fits.

        Raises:
          ZooError: what is missing or does not fit.
        """
        check_name(chain.name)
        for step in chain.steps:
            self.component(step.component)
            for id_ in step.deltas:
                if self.delta(id_).component != step.component:
                    raise ZooError(f"delta {id_} is for another component than {step.component}")
        if chain.tokenizer is not None:
            self.tokenizer_path(chain.tokenizer)
        if chain.source_files is not None:
            self.folder("sources", chain.source_files)

    # Chains

    def chains(self) -> list[str]:
        """Names of the models that have a live version, sorted."""
        folder = self.path / "chains"
        return sorted(n for n in os.listdir(folder) if (folder / n / "current").is_file())

    def versions(self, name: str) -> list[int]:
        """Versions of a model, oldest first; empty when there is none."""
        folder = self._inside(self.path / "chains" / check_name(name))
        if not folder.is_dir():
            return []
        found = (_VERSION_FILE.fullmatch(f) for f in os.listdir(folder))
        return sorted(int(m[1]) for m in found if m)

    def chain(self, name: str, version: int | None = None) -> Chain:
        """One version of a model, by default the live one.

        Raises:
          NotFoundError: no such model or version (the known ones are named).
          ZooError: a damaged record.
        """
        folder = self._inside(self.path / "chains" / check_name(name))
        if version is None:
            with contextlib.suppress(NotFoundError):
                version = self.current(name)
        path = folder / f"{version}.json"
        # Another process may remove it at any moment.
        try:
            chain = Chain.from_json(codec.read_json(self._inside(path)))
        except ZooError:
            if path.exists():
                raise
            what, known = name if version is None else f"{name}@{version}", self.chains()
            raise NotFoundError(
                f"no model {what!r} in {self.path}; known: {', '.join(known) or 'none'}"
            ) from None
        if (chain.name, chain.version) != (name, version):
            raise ZooError(f"{path} describes {chain.name}@{chain.version}: the zoo is damaged")
        return chain

    def current(self, name: str) -> int:
        """The live version of a model.

        Raises:
          NotFoundError: there is none.
          ZooError: its record is damaged.
        """
        path = self._inside(self.path / "chains" / check_name(name) / "current")
        try:
            return int(path.read_bytes().decode())
        except FileNotFoundError as e:
            raise NotFoundError(
                f"{self.path} has no model {name}: it was removed or never added"
            ) from e
        except (OSError, ValueError) as e:
            raise ZooError(f"{path} does not name the live version ({e}); run fsck") from e

    # Paths

    def folder(self, kind: str, id: str) -> Path:
        """The folder of a component, delta, tokenizer or source.

        Raises:
          ZooError: `id` is no id, or the zoo does not hold it.
        """
        path = self._inside(self.path / kind / codec.check_id(id))
        if not path.is_dir():
            raise NotFoundError(
                f"{self.path} has no {kind[:-1]} {id}: it was removed or never added"
            )
        return path

    @contextmanager
    def reading(self, kind: str, id: str) -> Iterator[Path]:
        """The folder of something of a kind for as long as files in it are read.

        Raises:
          NotFoundError: the zoo does not hold it, or another process removed it meanwhile.
          ZooError, OSError: what the block raises, of a folder that is still there.
        """
        folder = self.folder(kind, id)
        before = disk.identity(folder)
        try:
            yield folder
        except NotFoundError:
            raise
        except (ZooError, OSError) as e:
            # Removed by one rename, and perhaps added again.
            if before is None or disk.identity(folder) != before:
                raise NotFoundError(
                    f"{self.path} has no {kind[:-1]} {id} any more: it was removed while it was read"
                ) from e
            raise

    def _inside(self, path: Path) -> Path:
        if Path(os.path.realpath(path)) != path:
            raise ZooError(f"{path} is a link: a zoo holds everything itself; replace it by a copy")
        return path

    def _record(self, kind: str, id: str) -> dict[str, Any]:
        with self.reading(kind, id) as folder:
            return codec.read_json(self._inside(folder / "spec.json"))

    def _load(
        self, kind: str, id: str, records: Mapping[str, TensorRecord]
    ) -> dict[str, np.ndarray]:
        if not records:
            return {}
        with self.reading(kind, id) as folder:
            return params.load(self._inside(folder / "params"), records)

    def _verify(self, id: str, header: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        found = ids.content_id(header, tensors)
        if found != id:
            raise ZooError(
                f"{id} holds other content than its id says (hash {found}): the zoo is damaged; "
                "remove the folder and convert the model again"
            )

    def _add_version(self, chain: Chain, folder: Path, scratch: Path) -> Chain:
        wanted = {**chain.to_json(), "version": 0}
        versions = self.versions(chain.name)
        for version in versions:
            there = codec.read_json(folder / f"{version}.json")
            # By way of the record: an older one lacks fields that were added later.
            same = Chain.from_json({**there, "version": 0}).to_json()
            if canonical_json(same | {"origin": {}}) == canonical_json(wanted | {"origin": {}}):
                return self.chain(chain.name, version)
        version = max(versions, default=0) + 1
        while True:
            data = canonical_json({**wanted, "version": version}) + "\n"
            aside = scratch / f"{version}.json"
            disk.write_new(aside, data.encode())
            try:
                # A link, not a rename: it fails when another writer took the number.
                os.link(aside, folder / f"{version}.json")
                break
            except FileExistsError:
                version += 1
        disk.fsync_path(folder)
        return self.chain(chain.name, version)

    def cut_cost(self, chains: Mapping[str, Chain]) -> partition.Cost | None:
        """What cuts cost on this machine, if it was measured here (`jblock-convert profile`)."""
        measured = latency_profiles.read(self.path / "profiles", latency_profiles.target())
        if measured is None:
            return None
        ids_ = {s.component for c in chains.values() for s in c.steps}
        return partition.Cost(
            hop_seconds=measured.hop_seconds,
            bytes_per_second=measured.bytes_per_second,
            nbytes={i: self.component(i).nbytes for i in ids_},
        )

    def write_partition(self, scratch: Path) -> None:
        """Writes the partition of the live chains anew. Call it with the exclusive lock held."""
        live = {}
        for name in self.chains():
            try:
                live[name] = self.chain(name)
            except ZooError:
                continue  # fsck reports it; the partition is derived and can be made again
        cut = partition.blocks(live, self.cut_cost(live))
        data = canonical_json({"blocks": partition.to_json(cut)}) + "\n"
        disk.write_atomic(self.path / "partition" / "current.json", data.encode(), scratch)
