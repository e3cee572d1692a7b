"""Which step of a base gets which tensors of an adapter, whatever format the adapter came in."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.source import Source
from jblock.blocks.delta_spec import DeltaSpec


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A tensor of the adapter's files, or some of its columns."""

    name: str
    columns: tuple[int, int] | None = None

    def read(self, source: Source) -> np.ndarray:
        """Its numbers."""
        value = source.read(self.name)
        return (
            value if self.columns is None else np.ascontiguousarray(value[:, slice(*self.columns)])
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedDelta:
    """A delta on the step of number `index`: delta tensor -> what of the adapter it is."""

    index: int
    spec: DeltaSpec
    tensors: dict[str, TensorSource]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What an adapter is made of.

    Attributes:
      deltas: in the order of their steps, and of their effect.
      replaced: step -> tensor of its component -> the adapter's tensor that stands for it, where a matrix
        is among them. An adapter on an embedding brings the base's own along, so they may be equal.
    """

    deltas: tuple[PlannedDelta, ...]
    replaced: dict[int, dict[str, str]]

    def on(self, index: int) -> list[PlannedDelta]:
        """The deltas of a step."""
        return [d for d in self.deltas if d.index == index]


def component_tensors(
    stored: Mapping[str, np.ndarray], replaced: Mapping[str, str], source: Source
) -> dict[str, np.ndarray] | None:
    """A component with tensors of an adapter in place of its own; None where all are equal.

    Raises:
      CheckpointError: the component has something else in their place (weights of few bits).
    """
    lacking = sorted(replaced.keys() - stored.keys())
    if lacking:
        raise CheckpointError(
            f"the adapter has {replaced[lacking[0]]!r} whole, which the base has in few bits: give the "
            "base that it was made from"
        )
    new = {name: source.read(taken) for name, taken in replaced.items()}
    same = all(
        value.dtype == stored[name].dtype and value.tobytes() == stored[name].tobytes()
        for name, value in new.items()
    )
    return None if same else {**stored, **new}
