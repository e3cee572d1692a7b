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
from jblock.blocks.spec_json import canonical_json
from jblock.zoo import (
    checks,
    codec,
    disk,
    garbage,
    latency_profiles,
    lease,
    partition,
    registry,
)
from jblock.zoo.journal import Journal
from jblock.zoo.objects import Objects
from jblock.zoo.records import (
    Chain,
    DamagedError,
    NotFoundError,
    ZooError,
    check_name,
    split_version,
)
from jblock.zoo.storage import Changes, FolderStorage, Storage
from jblock.zoo.verification import Verification
from jblock.zoo.writer import Writer

FORMAT = 2
READ_FORMATS = (1, 2)
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


class Zoo(Objects):
    """One zoo. Make it with `Zoo.create` or `Zoo.open`; see `Objects` for what reads by id."""

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

            ObjectStorage(str(path)).create(_zoo_json())
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
                disk.write_atomic(root / "zoo.json", _zoo_json(), scratch)
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

    @contextmanager
    def changing(self, purpose: str) -> Iterator[Changes]:
        """Holds the exclusive lock of a zoo, which is of the newest format from then on.

        Raises:
          LockedError: another process holds it for longer than anybody waits.
        """
        with self.storage.exclusive(purpose) as changes:
            found = codec.parse_json(self.storage.read("zoo.json"), "zoo.json")
            if found.get("format") != FORMAT:
                changes.put("zoo.json", _zoo_json())
            yield changes

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

    def check_chain(self, chain: Chain) -> None:
        """Checks that everything a chain names is there and fits, and that its policy is not too narrow.

        Raises:
          ZooError: what is missing or does not fit.
        """
        check_name(chain.name)
        specs, deltas = [], []
        for step in chain.steps:
            spec = self.component(step.component).spec
            specs.append(spec)
            deltas.append([self.delta(id_).spec for id_ in step.deltas])
            for id_, delta in zip(step.deltas, deltas[-1], strict=True):
                record = self.delta(id_)
                if record.component != step.component:
                    raise DamagedError(
                        f"delta {id_} is for another component than {step.component}"
                    )
                shapes = {name: t.shape for name, t in record.tensors.items()}
                codec.check_shapes(f"delta {id_}", shapes, codec.shapes_of(delta, spec))
            for component, _ in self.component(step.component).refs.values():
                self.component(component)
        checks.check_steps(chain, specs, deltas)
        self._check_there(chain)

    def _check_there(self, chain: Chain) -> None:
        wanted = {f"components/{s.component}" for s in chain.steps}
        wanted |= {f"deltas/{d}" for s in chain.steps for d in s.deltas}
        wanted |= {f"{kind}/{id_}" for kind, id_ in chain.folders}
        for name in sorted(wanted):
            kind, _, id_ = name.partition("/")
            codec.check_id(id_)
            if not self.storage.exists(name):
                raise NotFoundError(
                    f"{self.storage.location} has no {kind[:-1]} {id_}: it was removed or never added"
                )

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

    # Models

    def models(self) -> list[str]:
        """Names under chains/, of models with an active version or without, sorted."""
        return registry.models(self.storage)

    def chains(self) -> list[str]:
        """Names of the models that have an active version, sorted; one that cannot be read is left out."""
        found = []
        for name in self.models():
            with contextlib.suppress(ZooError):
                if registry.read(self.storage, name).active is not None:
                    found.append(name)
        return found

    def model(self, name: str) -> registry.Model:
        """The pointer of a model: its versions, which of them is active, its aliases and its history.

        Raises:
          NotFoundError: there never was one.
          ZooError: it cannot be read.
        """
        model = registry.read(self.storage, name)
        if model.next == 1:
            known = ", ".join(self.chains()) or "none"
            raise NotFoundError(f"no model {name!r} in {self.storage.location}; known: {known}")
        return model

    def versions(self, name: str) -> list[int]:
        """Versions of a model, oldest first; empty when there is none."""
        return sorted(registry.read(self.storage, name).versions)

    def chain(self, name: str, version: int | str | None = None) -> Chain:
        """One version of a model, by default the active one.

        Args:
          name: of the model, or NAME@VERSION.
          version: its number, or an alias; None: the active one.

        Raises:
          NotFoundError: no such model or version (the known ones are named).
          ZooError: a damaged record.
        """
        if version is None and "@" in name:
            name, _, version = name.partition("@")
        model = registry.read(self.storage, name)
        number: int | None = None
        with contextlib.suppress(NotFoundError):
            number = model.active if version is None else registry.resolve(model, str(version))
        if number is None:
            raise self._unknown(model, version)
        try:
            found = registry.chain(self.storage, name, number)
        except NotFoundError:
            # Another process may remove it at any moment; what is still listed is lost.
            model = registry.read(self.storage, name)
            if number in model.versions:
                raise DamagedError(
                    f"{self.storage.location}/{registry.path_of(name, number)} is missing: the zoo is "
                    "damaged; run fsck"
                ) from None
            raise self._unknown(model, version) from None
        if model.versions[number] not in ("", found.digest):
            raise DamagedError(
                f"{name}@{number} has another digest than when it was published: its record was changed; "
                "run 'fsck --repair' and convert the model again"
            )
        return found

    def active(self, name: str) -> int:
        """The active version of a model.

        Raises:
          NotFoundError: there is none.
          ZooError: its record is damaged.
        """
        model = registry.read(self.storage, name)
        if model.active is None:
            raise self._unknown(model, None)
        return model.active

    def activate(self, name: str, version: int | str) -> registry.Model:
        """Makes a version of a model the active one; returns the model as it is then.

        Raises:
          NotFoundError: no such model or version.
        """
        chain = self.chain(name, version)
        self.check_chain(chain)
        with self.changing(f"activating {name}@{version}") as changes:
            model = registry.with_digests(self.storage, self.model(name))
            if chain.version not in model.versions:
                raise self._unknown(model, version)
            if model.active == chain.version:
                return model
            return registry.activate(changes, model, chain.version)

    def rollback(self, name: str) -> registry.Model:
        """Makes the version active that was so before; returns the model as it is then.

        Raises:
          NotFoundError: no such model, or no earlier active version is left.
        """
        with self.changing(f"rolling {name} back") as changes:
            model = registry.with_digests(self.storage, self.model(name))
            version = model.before()
            if version is None:
                raise NotFoundError(
                    f"{name} had no other active version that is still there: activate one of "
                    f"{', '.join(map(str, sorted(model.versions))) or 'none'}"
                )
            self.check_chain(registry.chain(self.storage, name, version))
            return registry.activate(changes, model, version, "rollback")

    def alias(self, name: str, alias: str, version: int | str | None) -> registry.Model:
        """Lets NAME@ALIAS stand for a version; None takes the alias away.

        Raises:
          NotFoundError: no such model, version or alias.
        """
        registry.check_alias(alias)
        with self.changing(f"naming a version of {name}") as changes:
            model = registry.with_digests(self.storage, self.model(name))
            if version is None and alias not in model.aliases:
                raise _unknown_alias(model, alias)
            number = None if version is None else registry.resolve(model, str(version))
            return registry.alias(changes, model, alias, number)

    def _unknown(self, model: registry.Model, version: int | str | None) -> NotFoundError:
        where = self.storage.location
        if version is None and model.versions:
            known = ", ".join(map(str, sorted(model.versions)))
            return NotFoundError(
                f"model {model.name!r} in {where} has no active version, but {known}: 'jblock convert "
                f"activate {model.name}@{max(model.versions)}' makes one active"
            )
        if version is not None and model.versions:
            return registry.unknown_version(model, str(version))
        what = model.name if version is None else f"{model.name}@{version}"
        known = ", ".join(self.chains()) or "none"
        return NotFoundError(f"no model {what!r} in {where}; known: {known}")

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


def _unknown_alias(model: registry.Model, alias: str) -> NotFoundError:
    """The error for an alias that a model does not have."""
    return NotFoundError(
        f"model {model.name} has no alias {alias!r}; known: {', '.join(sorted(model.aliases)) or 'none'}"
    )


def _zoo_json() -> bytes:
    return (canonical_json({"format": FORMAT}) + "\n").encode()
