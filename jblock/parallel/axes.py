"""The axes of every component's tensors: which rule each follows, and where its entries come from."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    ExpertSpec,
    FfnSpec,
    RouterSpec,
    UnembeddingSpec,
    projection_shape,
)
from jblock.parallel.rules import ShardingRules
from jblock.parallel.spread import FILL, columns, elements, kv_heads, query_heads


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a tensor on the mesh.

    Attributes:
      logical: the sharding rule it follows; None is split over nothing.
      sources: int, for every entry the entry of the stored tensor, spread.FILL for zeros; None if it
        is as stored.
    """

    logical: str | None = None
    sources: np.ndarray | None = None

    def size(self, stored: int) -> int:
        """Entries on the mesh of an axis stored with so many."""
        return stored if self.sources is None else len(self.sources)


_WHOLE = Axis()
# Projection -> names of its output's and its input's axis. What is split on its input gives partial
# sums, which blocks/linear.py adds up over the devices.
_PROJECTIONS: Mapping[type, Mapping[str, tuple[str | None, str | None]]] = {
    AttentionSpec: {
        "q": ("heads", None),
        "k": ("kv_heads", None),
        "v": ("kv_heads", None),
        "o": (None, "heads"),
    },
    FfnSpec: {"gate": ("mlp", None), "up": ("mlp", None), "down": (None, "mlp")},
    ExpertSpec: {"gate": ("mlp", None), "up": ("mlp", None), "down": (None, "mlp")},
    RouterSpec: {"router": (None, None), "shared_gate": (None, None)},
}


def tensor_axes(
    spec: ComponentSpec, name: str, rules: ShardingRules, rank: int
) -> tuple[Axis, ...]:
    """The axes of one tensor of `rank` axes, laid as `blocks.layout.compute_shapes` says.

    Raises:
      ValueError: there is no rule for the tensor, so that it cannot be split over devices.
    """
    joint = isinstance(spec, AttentionSpec) and spec.qk_norm_joint
    if joint and not rules.single and name.startswith(("q_norm", "k_norm")):
        raise ValueError("qk_norm_joint: a norm over all heads together has no rule for --mesh")
    whole = "norm" in name or spec.kind in ("norm", "stitch") or name == "positions.weight"
    if rules.single or whole:
        return (_WHOLE,) * rank
    if spec.kind in ("embedding", "unembedding") and name == "weight":
        return _axis(spec, "vocab", rules), _WHOLE
    projection, _, tensor = name.rpartition(".")
    if tensor == "weight":
        return projection_axes(spec, projection, rules)
    if tensor == "bias":
        return projection_axes(spec, projection, rules)[:1]
    if tensor in (CODES, SCALES, ZEROS, ORDER):
        return _quantized_axes(spec, projection, tensor, rules)
    raise ValueError(f"tensor {name!r} of a {spec.kind} component has no rule for --mesh")


def _quantized_axes(
    spec: ComponentSpec, projection: str, tensor: str, rules: ShardingRules
) -> tuple[Axis, ...]:
    """Scales are split with the inputs they are for, so a group has to stay together."""
    out, inner = projection_axes(spec, projection, rules)
    if inner.sources is None:
        return (_WHOLE,) if tensor == ORDER else (out, inner)
    quant = getattr(spec, "quant", None)
    inputs = projection_shape(spec, projection)[1]
    if tensor == ORDER or quant is None or quant.ordered:
        raise ValueError(
            f"projection {projection!r} of a {spec.kind} component is quantized with permuted inputs "
            "(act-order), which --mesh would have to split: quantize the model anew, or use one device"
        )
    group = quant.group_of(inputs)
    sources = inner.sources
    fits = len(sources) % (group * rules.ways(inner.logical)) == 0
    groups = sources.reshape(-1, group) if fits else sources[:0].reshape(0, 1)
    whole = (groups[:, :1] == FILL) | (groups[:, :1] % group == 0)
    steps = np.where(groups[:, :1] == FILL, FILL, groups[:, :1] + np.arange(group))
    if not fits or not whole.all() or (groups != steps).any():
        raise ValueError(
            f"projection {projection!r} of a {spec.kind} component is quantized in groups of {group} "
            f"inputs, which mesh {rules.mesh} would cut: quantize it with a smaller --group, or give a "
            "smaller mesh"
        )
    if tensor == CODES:
        return out, inner
    first = groups[:, 0]
    return out, Axis(inner.logical, np.where(first == FILL, FILL, first // group))


def projection_axes(
    spec: ComponentSpec, projection: str, rules: ShardingRules
) -> tuple[Axis, Axis]:
    """The output's and the input's axis of a projection.

    Raises:
      ValueError: there is no rule for the projection.
    """
    if rules.single:
        return _WHOLE, _WHOLE
    names = _PROJECTIONS.get(type(spec), {}).get(projection)
    if names is None:
        raise ValueError(
            f"projection {projection!r} of a {spec.kind} component has no rule for --mesh"
        )
    out, inner = (_axis(spec, name, rules) for name in names)
    return out, inner


def _axis(spec: ComponentSpec, name: str | None, rules: ShardingRules) -> Axis:
    if name is None:
        return _WHOLE
    logical = "heads" if name == "kv_heads" else name
    ways = rules.ways(logical)
    if isinstance(spec, AttentionSpec):
        if name == "heads":
            heads = query_heads(spec.num_heads, spec.num_kv_heads, ways)
        else:
            heads = kv_heads(spec.num_kv_heads, ways)
        return Axis(logical, elements(heads, spec.head_dim))
    if isinstance(spec, (FfnSpec, ExpertSpec)):
        return Axis(logical, columns(spec.intermediate_size, ways))
    if isinstance(spec, (EmbeddingSpec, UnembeddingSpec)):
        return Axis(logical, columns(spec.vocab_size, ways))
    raise ValueError(f"a {spec.kind} component has no axis {name!r}")
