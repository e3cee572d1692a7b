"""Deltas merged into the weights they ride on: what a chain with an adapter computes, as plain weights.

One delta after the other, as the engine composes them (`engine/adapters/compose.py`), which keeps them apart
from the weights that its rows share.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jblock.blocks import compress
from jblock.blocks.compressed_spec import BitDeltaSpec, LowRankSpec
from jblock.blocks.delta_spec import BiasNormSpec, DeltaSpec, Ia3Spec, LoraSpec, LoraTarget
from jblock.blocks.spec import AttentionSpec, ComponentSpec, EmbeddingSpec, FfnSpec
from jblock.zoo.records import Step, ZooError
from jblock.zoo.store import Zoo

Values = dict[str, np.ndarray]
_QKV = ("q", "k", "v", "qkv")


def unmergeable(zoo: Zoo, steps: Sequence[Step]) -> str | None:
    """Why the deltas of some steps cannot be merged into their components; None if they can."""
    for step in steps:
        base = zoo.component(step.component).spec
        for id_ in step.deltas:
            reason = _reason(base, zoo.delta(id_).spec)
            if reason is not None:
                return f"delta {id_} {reason}"
    return None


def _reason(base: ComponentSpec, delta: DeltaSpec) -> str | None:
    if not isinstance(delta, LowRankSpec | BitDeltaSpec | BiasNormSpec | LoraSpec | Ia3Spec):
        return f"is {delta.kind}, which cannot be merged to measure"
    if isinstance(delta, LoraSpec) and delta.invocation:
        return "acts from its invocation on alone, and so cannot be merged"
    if isinstance(delta, LoraSpec) and not isinstance(
        base, AttentionSpec | FfnSpec | EmbeddingSpec
    ):
        biased = [name for name, target in delta.targets.items() if target.bias]
        if biased:
            return (
                f"has a bias on {biased[0]!r} of a {base.kind} component, which has no place for it"
            )
    return None


def merge(spec: ComponentSpec, values: Values, delta: DeltaSpec, tensors: Values) -> ComponentSpec:
    """Lets a delta act on a component's tensors.

    Args:
      spec: of the component, not quantized.
      values: its tensors in float32, as they are stored; changed in place.
      delta: one that `unmergeable` has nothing against.
      tensors: the delta's, as they are stored.

    Returns:
      The spec of what the component is then: with biases where the delta brings some.

    Raises:
      ZooError: a delta that cannot be merged, or DoRA on a weight of norm zero.
    """
    reason = _reason(spec, delta)
    if reason is not None:
        raise ZooError(f"a delta {reason}")
    if isinstance(delta, LowRankSpec | BitDeltaSpec):
        for name in delta.targets:
            _put(
                spec,
                values,
                name,
                _weight(spec, values, name) + compress.difference_of(delta, tensors, name),
            )
        return spec
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    if isinstance(delta, BiasNormSpec):
        values |= tensors
    elif isinstance(delta, Ia3Spec):
        for name in delta.outputs:
            scale = tensors[f"{name}.scale"]
            _put(spec, values, name, _weight(spec, values, name) * scale)
            if f"{name}.bias" in values:
                values[f"{name}.bias"] = values[f"{name}.bias"] * scale[:, 0]
        for name in delta.inputs:
            _put(spec, values, name, _weight(spec, values, name) * tensors[f"{name}.in_scale"])
    elif isinstance(delta, LoraSpec):
        for name, target in delta.targets.items():
            _put(spec, values, name, _lora(_weight(spec, values, name), name, target, tensors))
            if target.bias:
                added = np.float32(target.scale) * tensors[f"{name}.b_bias"]
                spec = _add_bias(spec, values, name, added)
    return spec


def _lora(
    weight: np.ndarray, name: str, target: LoraTarget, tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """[out, in] with the product of a and b, scaled to DoRA's magnitudes (arXiv 2402.09353) if it has any."""
    changed = weight + np.float32(target.scale) * (tensors[f"{name}.b"] @ tensors[f"{name}.a"])
    if not target.dora:
        return changed
    norms = np.linalg.norm(changed, axis=1)
    if not norms.all():
        raise ZooError(f"DoRA on {name!r}: a row of the weight has norm zero, so nothing scales it")
    return changed * (tensors[f"{name}.magnitude"] / norms)[:, None]


def _tensor(name: str) -> str:
    return name if name == "weight" else f"{name}.weight"


def _stored_transposed(spec: ComponentSpec, name: str) -> bool:
    if name == "weight":
        return isinstance(spec, EmbeddingSpec)
    return bool(getattr(spec, "transposed", False))


def _weight(spec: ComponentSpec, values: Values, name: str) -> np.ndarray:
    """[out, in] of a projection, however it is stored."""
    weight = values[_tensor(name)]
    return weight.T if _stored_transposed(spec, name) else weight


def _put(spec: ComponentSpec, values: Values, name: str, weight: np.ndarray) -> None:
    values[_tensor(name)] = weight.T if _stored_transposed(spec, name) else weight


def _add_bias(spec: ComponentSpec, values: Values, name: str, added: np.ndarray) -> ComponentSpec:
    """Adds to the bias of a projection, which the component may not have had."""
    if isinstance(spec, EmbeddingSpec):
        values["weight"] = values["weight"] + added  # to the row of every token
        return spec
    if isinstance(spec, AttentionSpec):
        if name in _QKV:
            spec = dataclasses.replace(spec, qkv_bias=True)
        else:
            spec = dataclasses.replace(spec, o_bias=True)
    elif isinstance(spec, FfnSpec):
        spec = dataclasses.replace(spec, bias=True)
    for other, shape in spec.tensors().items():
        if other.endswith(".bias") and other not in values:
            values[other] = np.zeros(shape, np.float32)
    values[f"{name}.bias"] = values[f"{name}.bias"] + added
    return spec
