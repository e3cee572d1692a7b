"""Recognizes components that differ from one of the zoo in biases and norms alone (BitFit, arXiv
2106.10199; frozen matrices under trained norms), so that only those are stored, as a delta."""

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from jblock.blocks.delta_spec import BiasNormSpec
from jblock.blocks.spec import ComponentSpec
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.zoo.ids import raw_bytes
from jblock.zoo.records import ComponentRecord, ZooError
from jblock.zoo.store import Zoo

# Elements looked at before a candidate is read: other weights differ in the first few.
_HEAD = 256


class Shared:
    """A component of the zoo with the same matrices, and the vectors that take the place of its own."""

    def __init__(self, component: str, vectors: Mapping[str, np.ndarray]):
        self.component, self.vectors = component, vectors
        self.spec = BiasNormSpec(names=tuple(sorted(vectors)))


class BitFitMatcher:
    """Finds such components in a zoo as it is now."""

    def __init__(self, zoo: Zoo):
        self._zoo = zoo
        self._records: dict[str, list[ComponentRecord]] | None = None

    def shared(
        self, spec: ComponentSpec, tensors: Mapping[str, np.ndarray], tied: Mapping[str, object]
    ) -> Shared | None:
        """The component that a new one shares its matrices with; None where there is none, or one that is
        equal altogether.

        Args:
          spec: of the new component.
          tensors: its own.
          tied: what it has by reference; such are not looked for.
        """
        matrices = [n for n, v in tensors.items() if v.ndim > 1]
        if tied or not matrices or len(matrices) == len(tensors):
            return None
        found: list[Shared] = []
        for record in self._candidates(spec):
            try:
                if not self._same_matrices(record, tensors, matrices):
                    continue
                vectors = self._changed(record.id, tensors)
            except ZooError:
                continue  # see _candidates
            else:
                if not vectors:
                    return None
                found.append(Shared(record.id, vectors))
        return min(found, key=lambda s: (len(s.vectors), s.component), default=None)

    def shared_norm(
        self, spec: ComponentSpec, tensors: Mapping[str, np.ndarray], head: str
    ) -> Shared | None:
        """The norm that the zoo's models have in front of the unembedding `head`, where it differs: with
        it shared, so is the block that both make."""
        norms: set[str] = set()
        found = []
        for name in self._zoo.chains():
            with contextlib.suppress(ZooError):
                before, last = self._zoo.chain(name).steps[-2:]
                if last.component == head and self._zoo.component(before.component).spec == spec:
                    norms.add(before.component)
        for norm in sorted(norms):
            with contextlib.suppress(ZooError):
                found.append(Shared(norm, self._changed(norm, tensors)))
        return None if not all(s.vectors for s in found) else next(iter(found), None)

    def _candidates(self, spec: ComponentSpec) -> Sequence[ComponentRecord]:
        if self._records is None:
            self._records = {}
            for id_ in self._zoo.storage.names("components"):
                try:
                    record = self._zoo.component(id_)
                except ZooError:
                    continue  # damaged or foreign, which is no concern of a new model; fsck tells
                if not record.refs:
                    self._records.setdefault(_text(record.spec), []).append(record)
        return self._records.get(_text(spec), ())

    def _same_matrices(
        self, record: ComponentRecord, tensors: Mapping[str, np.ndarray], matrices: Sequence[str]
    ) -> bool:
        if any(record.tensors[n].dtype != tensors[n].dtype.name for n in matrices):
            return False
        for name in matrices:
            flat = tensors[name].reshape(-1)
            head = flat[: min(_HEAD, flat.size)].astype(np.float32)
            if not np.array_equal(head, self._zoo.read_runs(record.id, name, [0], len(head))):
                return False
        return all(_equal(self._zoo.load_tensor(record.id, n), tensors[n]) for n in matrices)

    def _changed(self, id_: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: value
            for name, value in tensors.items()
            if value.ndim == 1 and not _equal(self._zoo.load_tensor(id_, name), value)
        }


def with_vectors(zoo: Zoo, component: str, deltas: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors of a step of a full model: its component's, with the vectors of its deltas.

    Raises:
      ZooError: something of them is missing or damaged.
    """
    tensors = zoo.load_component(component, verify=True)
    for id_ in deltas:
        tensors |= zoo.load_delta(id_, verify=True)
    return tensors


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and bool((raw_bytes(one) == raw_bytes(other)).all())


def _text(spec: ComponentSpec) -> str:
    return canonical_json(spec_to_json(spec))
