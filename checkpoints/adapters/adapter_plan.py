"""Which step of a base gets which tensors of an adapter, whatever format the adapter came in."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.source import Source
from jblock.blocks.compressed_spec import BitDeltaSpec
from jblock.blocks.delta_spec import BottleneckSpec, DeltaSpec, LoraSpec, PrefixSpec, PromptSpec
from jblock.blocks.spec import ComponentSpec, EmbeddingSpec, UnembeddingSpec
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


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
      vocab_size: tokens of the adapter's own vocabulary; 0 where it has the base's.
      left_out: tensors for parts of a multimodal model that text does not go through.
    """

    deltas: tuple[PlannedDelta, ...]
    replaced: dict[int, dict[str, str]]
    vocab_size: int = 0
    left_out: tuple[str, ...] = ()

    def on(self, index: int) -> list[PlannedDelta]:
        """The deltas of a step."""
        return [d for d in self.deltas if d.index == index]

    def spec(self, spec: ComponentSpec) -> ComponentSpec:
        """The spec of a component whose tensors are replaced."""
        if self.vocab_size and isinstance(spec, (EmbeddingSpec, UnembeddingSpec)):
            return dataclasses.replace(spec, vocab_size=self.vocab_size)
        return spec


def check_stack(zoo: Zoo, base: Chain, plan: AdapterPlan) -> None:
    """Checks that an adapter's deltas can act on what its base has, before a request finds out.

    Raises:
      CheckpointError: one needs the float weight of what is stored in few bits, or a model would have two
        of what it can have once.
    """
    if base.invocation and plan.deltas:
        raise CheckpointError(
            f"{base.name} is an activated LoRA, which acts on a part of a sequence alone: nothing can ride "
            f"on it; give --base {base.base or 'the model that it rides on'}"
        )
    before = [[zoo.delta(d).spec for d in step.deltas] for step in base.steps]
    virtual = (PromptSpec, PrefixSpec)
    if any(isinstance(s, virtual) for specs in before for s in specs) and any(
        isinstance(d.spec, virtual) for d in plan.deltas
    ):
        raise CheckpointError(
            f"{base.name} begins with virtual tokens already, and a model can have one prompt or prefix: "
            "add the adapter to a base without"
        )
    for delta in plan.deltas:
        specs = before[delta.index]
        if isinstance(delta.spec, BottleneckSpec) and any(
            isinstance(s, BottleneckSpec) for s in specs
        ):
            raise CheckpointError(
                f"{base.name} has a bottleneck adapter behind component {delta.index} already: add this one "
                "to a base without"
            )
        if not isinstance(delta.spec, LoraSpec):
            continue
        spec = zoo.component(base.steps[delta.index].component).spec
        dora = {name for name, target in delta.spec.targets.items() if target.dora}
        few = getattr(spec, "quant", None) is not None
        coded = {n for s in specs if isinstance(s, BitDeltaSpec) for n in s.targets} & dora
        if dora and (few or coded):
            raise CheckpointError(
                f"use_dora needs the float weights of {min(coded or dora)!r} (component {delta.index}), "
                f"which {base.name} has in few bits: add the adapter to the float model that it was made from"
            )


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
