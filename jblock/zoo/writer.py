"""Adding to a zoo: everything is staged in a scratch folder and moved in at the end, or not at all.

So an error half way (a NaN in the last layer, a full disk) leaves the zoo as it was, and a killed
writer leaves only a scratch folder that the next one removes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jblock.blocks.spec import ComponentSpec, DeltaSpec, canonical_json, spec_to_json
from jblock.zoo import codec, disk, ids, params
from jblock.zoo.records import ComponentRecord, ZooError

if TYPE_CHECKING:
    from jblock.zoo.store import Zoo


class Writer:
    """Stages components, deltas and folders of small files. Made by `Zoo.writer`.

    Nothing staged is visible before the `with` block ends without an error. Then everything is
    renamed into the zoo, what others refer to first.
    """

    def __init__(self, zoo: Zoo, scratch: Path):
        self._zoo = zoo
        self._scratch = scratch
        self._staged: dict[Path, Path] = {}  # target -> staged folder
        self._referring: set[Path] = set()  # targets that name other components
        self._records: dict[str, ComponentRecord] = {}
        self.new_bytes = 0

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
            target = self._records.get(component) or self._zoo.component(component)
            if tensor not in target.tensors:
                raise ZooError(
                    f"tensor {name!r} refers to {component}/{tensor}, which owns no such"
                )
            shapes.setdefault(name, target.tensors[tensor].shape)
        if refs.keys() & tensors.keys():
            raise ZooError(f"{sorted(refs.keys() & tensors.keys())} are given and tied: choose one")
        codec.check_shapes(spec.kind, shapes, spec.tensors())
        header = {"spec": spec_to_json(spec), "refs": {n: list(r) for n, r in refs.items()}}
        id_ = ids.content_id(header, tensors)
        record = ComponentRecord(
            id=id_, spec=spec, tensors=records, refs=refs, nbytes=_nbytes(tensors)
        )
        self._records[id_] = record
        self._stage(self._zoo.path / "components" / id_, header, tensors, bool(refs))
        return id_

    def put_delta(self, spec: DeltaSpec, component: str, tensors: Mapping[str, np.ndarray]) -> str:
        """Stages a delta on the component with id `component` unless the zoo has it.

        Raises:
          ZooError: tensors do not fit the spec, or the component is not there.
        """
        base = self._records.get(component) or self._zoo.component(component)
        shapes = {name: record.shape for name, record in ids.tensor_records(tensors).items()}
        codec.check_shapes(spec.kind, shapes, spec.tensors(base.spec))
        header = {"spec": spec_to_json(spec), "component": component}
        id_ = ids.content_id(header, tensors)
        self._stage(self._zoo.path / "deltas" / id_, header, tensors, True)
        return id_

    def put_files(self, kind: str, files: Mapping[str, bytes]) -> str:
        """Stages a folder of small files under `kind` ("tokenizers" or "sources")."""
        for name in files:
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise ZooError(f"file name {name!r} cannot be stored: give a plain name")
        id_ = ids.files_id(files)
        target = self._zoo.path / kind / id_
        if target not in self._staged and not target.exists():
            folder = self._new_folder(target)
            for name, data in files.items():
                (folder / name).write_bytes(data)
        return id_

    def commit(self) -> None:
        """Moves what was staged into the zoo."""
        # All at once, because every forced write waits for the disk's journal.
        for folder in self._staged.values():
            disk.fsync_tree(folder)
        # What others refer to is in place, on the disk, before what refers to it.
        for refers in (False, True):
            targets = [t for t in self._staged if (t in self._referring) is refers]
            for target in targets:
                disk.move_dir(self._staged[target], target)
            for parent in {t.parent for t in targets}:
                disk.fsync_path(parent)
        self._staged.clear()

    def _stage(
        self, target: Path, header: dict, tensors: Mapping[str, np.ndarray], refers: bool
    ) -> None:
        if target in self._staged or target.exists():
            return
        nbytes = _nbytes(tensors)
        folder = self._new_folder(target)
        if tensors:
            params.save(folder / "params", tensors)
        record = codec.record_json(header, ids.tensor_records(tensors), nbytes)
        (folder / "spec.json").write_text(canonical_json(record) + "\n")
        if refers:
            self._referring.add(target)
        self.new_bytes += nbytes

    def _new_folder(self, target: Path) -> Path:
        folder = self._scratch / f"{target.parent.name}-{target.name}"
        folder.mkdir()
        self._staged[target] = folder
        return folder


def _nbytes(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(t.nbytes for t in tensors.values())
