"""The zoo: content-addressed components and deltas, and the chains that name them.

    zoo.json                        format version
    components/<id>/                spec.json, params.safetensors; immutable
    deltas/<id>/                    the same, naming the component they apply to
    tokenizers/<id>/                tokenizer.json and its companions
    sources/<id>/                   small files of a checkpoint as they were, for export
    chains/<name>/<version>.json    immutable; chains/<name>/model.json points at the active one (registry.py)
    edges/<id>.json                 what was measured of substitutes (edges.py); immutable
    profiles/<target>/              what blocks take on one kind of machine (latency_profiles.py)
    tmp/                            leases, each the scratch folder of a process at work
    locks/                          whose turn it is to publish or remove
    journal/                        what interrupted conversions had finished
    quarantine/                     what `fsck --repair` moved out of the way

Reading needs no lock: everything under a final name is complete. A zoo is a folder, or a bucket with the same
names in it (object_storage.py).
"""

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jblock.blocks.delta_spec import DeltaSpec
from jblock.blocks.spec import ComponentSpec
from jblock.zoo import (
    codec,
    disk,
    garbage,
    latency_profiles,
    lease,
    partition,
    registry,
)
from jblock.zoo.journal import Journal
from jblock.zoo.models import READ_FORMATS, Models, zoo_json
from jblock.zoo.records import (
    Chain,
    NotFoundError,
    ZooError,
    split_version,
)
from jblock.zoo.storage import FolderStorage, Storage
from jblock.zoo.verification import Verification
from jblock.zoo.writer import Writer

FOLDERS = (
    "components",
    "deltas",
    "tokenizers",
    "sources",
    "chains",
    "edges",
    "tmp",
    "locks",
)
_OLD_FOLDERS = ("partition",)  # a zoo of format 1 that was never finished has it


class Zoo(Models):
    """One zoo. Make it with `Zoo.create` or `Zoo.open`; see `Models` for its models, and `Objects` for
    what reads by id."""

    def __init__(self, storage: Storage, verification: Verification | None = None):
        super().__init__(storage, verification)
        self._held = contextlib.ExitStack()
        self._lease: Path | None = None
        self._held_ids: set[str] = set()
        weakref.finalize(self, self._held.close)

    @classmethod
    def create(cls, path: str | os.PathLike) -> "Zoo":
        """Makes an empty zoo, or opens the one that is there.

        Raises:
          ZooError: the folder holds something else, or cannot be written.
        """
        if is_url(path):
            from jblock.zoo.object_storage import ObjectStorage

            ObjectStorage(str(path)).create(zoo_json())
            return cls.open(path)
        root = Path(path)
        if (root / "zoo.json").exists():
            return cls.open(root)
        with disk.disk_errors(root):
            # A writer killed in here leaves only folders of these names, and no zoo.json.
            ours = {*FOLDERS, *_OLD_FOLDERS, "zoo.json", "lost+found"}
            if root.exists() and not set(os.listdir(root)) <= ours:
                raise ZooError(f"{root} holds something else than a zoo: give an empty folder")
            root.mkdir(parents=True, exist_ok=True)
            for folder in FOLDERS:
                (root / folder).mkdir(exist_ok=True)
                disk.share(root / folder, root)
            disk.check_folder(root / "tmp")
            disk.fsync_path(root)
            with lease.lease(root / "tmp", purpose="making the zoo") as scratch:
                disk.write_atomic(root / "zoo.json", zoo_json(), scratch)
        return cls.open(root)

    @classmethod
    def open(cls, path: str | os.PathLike, verify: str = "never") -> "Zoo":
        """Opens a zoo for reading and adding.

        Args:
          path: a folder, or the URL of a bucket and a folder in it, such as s3://bucket/zoo.
          verify: which hashes are checked on loading; see `Verification`.

        Raises:
          ZooError: there is no zoo, or it is of a format this version does not know.
        """
        storage: Storage
        try:
            if is_url(path):
                from jblock.zoo.object_storage import ObjectStorage

                storage = ObjectStorage(str(path))
            else:
                storage = FolderStorage(Path(path).resolve(strict=True))
            found = codec.parse_json(storage.read("zoo.json"), f"{path}/zoo.json")
        except (FileNotFoundError, NotFoundError) as e:
            raise ZooError(
                f"{path} is not a zoo (no zoo.json): make one with 'jblock convert hf SRC --zoo "
                f"{path} --name NAME'"
            ) from e
        except OSError as e:
            raise ZooError(f"{path}/zoo.json cannot be read: {e}") from e
        if found.get("format") not in READ_FORMATS:
            raise ZooError(
                f"{path}/zoo.json says {found!r}; this version reads formats "
                f"{', '.join(map(str, READ_FORMATS))}: use the version of jblock that made it"
            )
        return cls(storage, Verification(verify))

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
            self.storage.clean()
            try:
                with self.storage.lease("adding to the zoo") as scratch:
                    writer = Writer(self, self.publish, scratch, journal)
                    yield writer
                    writer.commit()
            except NotFoundError:
                raise  # the same work again adds what is missing
            except Exception:
                if writer is not None:
                    self._take_back(writer)
                raise

    def _take_back(self, writer: Writer) -> None:
        """Removes what a writer that failed had moved in, but for what others rely on. It holds no lease."""
        writer.forget()
        if writer.added:
            # The error that led here is what the user must see.
            with contextlib.suppress(ZooError), self.changing("gc") as changes:
                garbage.sweep(self.storage, changes, garbage.find(self.storage, writer.added))

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

    def publish(self, chain: Chain, activate: bool = True) -> Chain:
        """Adds `chain` as a version of its name; returns it with its number.

        The version is a new one, unless the zoo has an equal version already.

        Args:
          chain: to add; a `base` it names is pinned by its digest.
          activate: make it the active version of its name.

        Raises:
          NotFoundError: the chain names something the zoo does not hold (any more).
          ZooError: what it names does not fit, or the disk is full.
        """
        chain = self._pin_base(chain)
        self.check_chain(chain)
        with self.changing(f"publishing {chain.name}") as changes:
            self._check_there(chain)  # nothing is removed from here on
            self._check_base(chain)
            return registry.publish(self.storage, changes, chain, activate)

    def _pin_base(self, chain: Chain) -> Chain:
        if chain.base is None:
            return chain
        name, number = split_version(chain.base)
        try:
            digest = self.chain(name, number).digest
        except NotFoundError as e:
            raise NotFoundError(
                f"{self.storage.location} has no model {chain.base}: it was removed"
            ) from e
        if chain.base_digest not in (None, digest):
            raise ZooError(
                f"{chain.name} is made for a {name} of digest {chain.base_digest}, {chain.base} here has "
                f"{digest}: give the version it was made for"
            )
        return dataclasses.replace(chain, base_digest=digest)

    def _check_base(self, chain: Chain) -> None:
        if chain.base is not None:
            name, number = split_version(chain.base)
            if number not in registry.read(self.storage, name).versions:
                raise NotFoundError(
                    f"{self.storage.location} has no model {chain.base}: it was removed"
                )

    # Serving

    def serve(self, name: str, version: int | str | None = None) -> Chain:
        """A version of a model to be served: held (see `hold`) and checked (see `check_chain`)."""
        chain = self.chain(name, version)
        self.hold(chain)
        self.check_chain(chain)
        return chain

    def hold(self, chain: Chain) -> None:
        """Keeps what a chain names from being removed for as long as this process lives, or `release`.

        Where the zoo cannot be written to, nothing keeps it; that is logged.

        Raises:
          NotFoundError: something of it is gone already.
        """
        ids = [*chain.ids, *(id_ for _, id_ in chain.folders)]
        with contextlib.suppress(ZooError):
            ids += [o for i in chain.ids for o, _ in self._refs(i)]
        try:
            if self._lease is not None and not self._lease.exists():
                # Broken while this process stood still, as on a suspended machine: all is held again.
                ids += self._held_ids
                self.release()
            if self._lease is None:
                self._lease = self._held.enter_context(self.storage.lease("serving"))
            self.storage.use(self._lease, ids)
            self._held_ids.update(ids)
        except OSError as e:
            lease.tell(
                f"{self.storage.location} cannot be written to ({e.strerror}): nothing keeps 'gc' from "
                f"removing what {chain.name} needs while it is served"
            )
        self._check_there(chain)

    def release(self) -> None:
        """Ends what `hold` began."""
        self._held.close()
        self._lease = None
        self._held_ids.clear()

    def _refs(self, id_: str) -> list[tuple[str, str]]:
        try:
            return list(self.component(id_).refs.values())
        except NotFoundError:
            return []  # a delta

    def block_plan(self, chains: Mapping[str, Chain]) -> partition.BlockPlan:
        """Which runs of components are blocks where these chains are served together."""
        return partition.plan_blocks(chains, self.cut_cost(chains))

    def cut_cost(self, chains: Mapping[str, Chain]) -> partition.Cost | None:
        """What cuts cost on this machine, if it was measured here (`jblock convert profile`)."""
        measured = latency_profiles.read(self.path / "profiles", latency_profiles.target())
        if measured is None:
            return None
        ids_ = {s.component for c in chains.values() for s in c.steps}
        return partition.Cost(
            hop_seconds=measured.hop_seconds,
            bytes_per_second=measured.bytes_per_second,
            nbytes={i: self.component(i).nbytes for i in ids_},
        )


def is_url(path: str | os.PathLike) -> bool:
    """Whether a zoo lies in a bucket: s3://, gs://, memory://."""
    return "://" in str(path)
