"""Adding to a zoo: everything is staged in the writer's lease and moved in when it is complete.

Large work is moved in by parts, so that a try that was killed can be gone on with; nothing refers to
them before the chain is published. An error half way (a NaN in the last layer, a full disk) removes
them again.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jblock.blocks.delta_spec import DeltaSpec, delta_to_json
from jblock.blocks.spec import ComponentSpec
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.zoo import codec, ids, params
from jblock.zoo.journal import Journal
from jblock.zoo.objects import Objects
from jblock.zoo.records import Chain, ComponentRecord, ZooError

# Staged bytes at which they are moved in: what a killed try repeats at most. Every part waits for the
# disk's journal, which is little beside so many bytes.
PART_BYTES = 128 << 20


class Writer:
    """Stages components, deltas and folders of small files. Made by `Zoo.writer`.

    What is staged is renamed into the zoo when there is enough of it and when the `with` block ends
    without an error, what others refer to first.

    Attributes:
      new_bytes: tensor bytes added to the zoo.
      added: ids moved into the zoo.
    """

    def __init__(
        self,
        zoo: Objects,
        publish: Callable[[Chain, bool], Chain],
        scratch: Path,
        journal: Journal | None = None,
    ):
        self._zoo = zoo
        self._publish = publish
        self._journal = journal
        self._finished: dict[str, str] = {}  # staged parts by label
        self._staged_bytes = 0
        self.added: set[str] = set()
        self._scratch = scratch
        self._staged: dict[str, Path] = {}  # name in the zoo -> staged folder
        self._referring: set[str] = set()  # names of what refers to other components
        self._records: dict[str, ComponentRecord] = {}
        self.new_bytes = 0

    def finished(self, label: str) -> str | None:
        """The id of a component that an earlier try of this work finished, if it is there."""
        id_ = self._journal.ids.get(_short(label)) if self._journal else None
        if id_ is None:
            return None
        return id_ if self.has("components", id_) else None

    def has(self, kind: str, id_: str) -> bool:
        """Whether the zoo has a component or delta, or it is staged; it stays as long as this writer."""
        self._use(id_)
        name = f"{kind}/{id_}"
        return name in self._staged or self._zoo.storage.exists(name)

    def finish(self, label: str, id_: str) -> None:
        """Notes that a part of the work became `id_`, so that a later try need not repeat it."""
        if self._journal is not None:
            self._finished[_short(label)] = id_
        self.advance()

    def advance(self) -> None:
        """Moves in what is staged, if it is enough to be worth the wait for the disk."""
        if self._staged_bytes >= PART_BYTES:
            self.commit()

    def publish(self, chain: Chain, activate: bool = True) -> Chain:
        """Moves in what is staged and publishes a chain of it; see `Zoo.publish`."""
        self.commit()
        published = self._publish(chain, activate)
        if self._journal is not None:
            self._journal.remove()
        return published

    def put_component(
        self,
        spec: ComponentSpec,
        tensors: Mapping[str, np.ndarray],
        refs: Mapping[str, tuple[str, str]] | None = None,
    ) -> str:
        """Stages a component unless the zoo has it; returns its id.

        Args:
          spec: dimensions and options; fixes names and shapes of the tensors.
          tensors: the tensors the component owns.
          refs: tensor name -> (component id, tensor name) for those tied to another component.

        Raises:
          ZooError: tensors and references do not fit the spec, or a reference leads nowhere.
        """
        refs = dict(refs or {})
        records = ids.tensor_records(tensors)
        shapes = {name: record.shape for name, record in records.items()}
        for name, (component, tensor) in refs.items():
            self._use(component)
            target = self._records.get(component) or self._zoo.component(component)
            if tensor not in target.tensors:
                raise ZooError(
                    f"tensor {name!r} refers to {component}/{tensor}, which owns no such"
                )
            shapes.setdefault(name, target.tensors[tensor].shape)
        if refs.keys() & tensors.keys():
            raise ZooError(f"{sorted(refs.keys() & tensors.keys())} are given and tied: choose one")
        codec.check_shapes(spec.kind, shapes, spec.tensors())
        codec.check_dtypes(spec, records)
        header = {"spec": spec_to_json(spec), "refs": {n: list(r) for n, r in refs.items()}}
        id_ = ids.content_id(header, tensors)
        record = ComponentRecord(
            id=id_, spec=spec, tensors=records, refs=refs, nbytes=_nbytes(tensors)
        )
        self._records[id_] = record
        self._stage(f"components/{id_}", header, tensors, bool(refs))
        return id_

    def put_delta(self, spec: DeltaSpec, component: str, tensors: Mapping[str, np.ndarray]) -> str:
        """Stages a delta on the component with id `component` unless the zoo has it.

        Raises:
          ZooError: tensors do not fit the spec, or the component is not there.
        """
        self._use(component)
        base = self._records.get(component) or self._zoo.component(component)
        records = ids.tensor_records(tensors)
        shapes = {name: record.shape for name, record in records.items()}
        codec.check_shapes(spec.kind, shapes, spec.tensors(base.spec))
        codec.check_dtypes(spec, records)
        header = {"spec": delta_to_json(spec), "component": component}
        id_ = ids.content_id(header, tensors)
        self._stage(f"deltas/{id_}", header, tensors, True)
        return id_

    def put_files(self, kind: str, files: Mapping[str, bytes]) -> str:
        """Stages a folder of small files under `kind` ("tokenizers" or "sources")."""
        for name in files:
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise ZooError(f"file name {name!r} cannot be stored: give a plain name")
        id_ = ids.files_id(files)
        target = f"{kind}/{id_}"
        self._use(id_)
        if target not in self._staged and not self._zoo.storage.exists(target):
            folder = self._new_folder(target)
            for name, data in files.items():
                (folder / name).write_bytes(data)
        return id_

    def commit(self) -> None:
        """Moves what was staged into the zoo."""
        # What others refer to is in place, on the disk, before what refers to it.
        for refers in (False, True):
            part = {n: f for n, f in self._staged.items() if (n in self._referring) is refers}
            added = self._zoo.storage.move_in(part, self._scratch) if part else []
            self.added |= {name.partition("/")[2] for name in added}
        self._staged.clear()
        self._staged_bytes = 0
        if self._journal is not None and self._finished:
            self._journal.ids |= self._finished
            self._finished = {}
            self._journal.write(self._scratch)

    def forget(self) -> None:
        """Removes the journal: what is finished will be taken back."""
        if self._journal is not None:
            self._journal.remove()

    def _stage(
        self, target: str, header: dict, tensors: Mapping[str, np.ndarray], refers: bool
    ) -> None:
        self._use(target.partition("/")[2])
        if target in self._staged or self._zoo.storage.exists(target):
            return
        nbytes = _nbytes(tensors)
        folder = self._new_folder(target)
        if tensors:
            params.save(folder, tensors)
        record = codec.record_json(header, ids.tensor_records(tensors), nbytes)
        (folder / "spec.json").write_text(canonical_json(record) + "\n")
        if refers:
            self._referring.add(target)
        self.new_bytes += nbytes
        self._staged_bytes += nbytes

    def _use(self, id_: str) -> None:
        self._zoo.storage.use(self._scratch, [id_])

    def _new_folder(self, target: str) -> Path:
        folder = self._scratch / target.replace("/", "-")
        folder.mkdir()
        self._staged[target] = folder
        return folder


def _nbytes(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _short(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:32]
