"""Delta specs: everything about what a fine-tune adds to a component it shares, except the numbers.

Tensors keep the shapes of the files they came from, so that an export writes the same bytes; names are
those of the component's own tensors and projections. What blocks compute with is worked out when a
delta is loaded (`engine/slot_content.py`).
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from jblock.blocks.compressed_spec import (
    BitDeltaSpec,
    LowRankSpec,
    compressed_from_json,
    compressed_to_json,
)
from jblock.blocks.rope_spec import SpecError
from jblock.blocks.spec import (
    ACTIVATIONS,
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    FfnSpec,
    projection_shape,
)
from jblock.blocks.spec_json import fields_to_json

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTarget:
    """LoRA on one projection: `y += scale * (b @ (a @ x) + b_bias)`.

    Attributes:
      rank: inner width.
      scale: alpha / rank (or alpha / sqrt(rank) for rsLoRA), already worked out.
      dora: the columns of what the sum projects with are scaled to the norms in `magnitude`
        (arXiv 2402.09353).
      bias: b has a bias.
    """

    rank: int
    scale: float
    dora: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank delta (arXiv 2106.09685) on some projections of one component.

    Tensors, for every projection `p` in targets: `p.a [rank, in]`, `p.b [out, rank]`, with dora
    `p.magnitude [out]`, with bias `p.b_bias [out]`.

    Attributes:
      targets: projection as `projection_shape` knows it ("q", "gate_up", ...) -> its rank and scale.
      invocation: of an activated LoRA (arXiv 2504.12397), the tokens from whose last occurrence in a prompt
        on it acts, these included; it is not there for what comes before. (): it always acts.
    """

    kind: ClassVar[str] = "lora"
    targets: dict[str, LoraTarget]
    invocation: tuple[int, ...] = ()

    def __post_init__(self):
        if not all(type(token) is int and 0 <= token < 2**31 for token in self.invocation):
            raise SpecError(f"the invocation tokens {self.invocation} are no token ids")

    def tensors(self, base: ComponentSpec) -> Shapes:
        """Name -> shape, for a delta on a component with spec `base`.

        Raises:
          SpecError: base has no projection of a target's name.
        """
        shapes: Shapes = {}
        for name, target in sorted(self.targets.items()):
            out, inner = projection_shape(base, name)
            shapes[f"{name}.a"] = (target.rank, inner)
            shapes[f"{name}.b"] = (out, target.rank)
            if target.dora:
                shapes[f"{name}.magnitude"] = (out,)
            if target.bias:
                shapes[f"{name}.b_bias"] = (out,)
        return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3Spec:
    """Learned scales (IA)3 (arXiv 2205.05638) on some projections of one component.

    Tensors: `p.scale [out, 1]` multiplies what projection `p` gives, its bias included; `p.in_scale
    [1, in]` what it reads.

    Attributes:
      outputs: projections whose outputs are scaled.
      inputs: projections whose inputs are scaled.
    """

    kind: ClassVar[str] = "ia3"
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LoraSpec.tensors`."""
        shapes: Shapes = {f"{p}.scale": (projection_shape(base, p)[0], 1) for p in self.outputs}
        return shapes | {f"{p}.in_scale": (1, projection_shape(base, p)[1]) for p in self.inputs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasNormSpec:
    """Biases and norm weights (BitFit, arXiv 2106.10199) that take the place of the component's own.

    Attributes:
      names: of the vectors among the component's tensors.
    """

    kind: ClassVar[str] = "vectors"
    names: tuple[str, ...]

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LoraSpec.tensors`; SpecError where base has no vector of a name."""
        shapes = base.tensors()
        for name in self.names:
            if len(shapes.get(name, ())) != 1:
                raise SpecError(f"{name!r} is not a bias or norm of a {base.kind} component")
        return {name: shapes[name] for name in self.names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Prompt tuning (arXiv 2104.08691): what an embedding gives for virtual tokens in front of every
    prompt. Tensors: `prompt [tokens, hidden]`."""

    kind: ClassVar[str] = "prompt"
    tokens: int

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LoraSpec.tensors`."""
        if not isinstance(base, EmbeddingSpec):
            raise SpecError(f"a prompt belongs to an embedding, not to a {base.kind} component")
        return {"prompt": (self.tokens, base.hidden_size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSpec:
    """Prefix tuning (arXiv 2101.00190): keys, as they lie in the cache, and values of virtual tokens in
    front of every prompt. Tensors: `k` and `v`, both `[tokens, kv_heads * head_dim]`."""

    kind: ClassVar[str] = "prefix"
    tokens: int

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LoraSpec.tensors`."""
        if not isinstance(base, AttentionSpec):
            raise SpecError(f"a prefix belongs to an attention, not to a {base.kind} component")
        shape = (self.tokens, base.widths["k"])
        return {"k": shape, "v": shape}


BOTTLENECK_INPUTS = ("sum", "output", "input")
BOTTLENECK_ACTIVATIONS = (*ACTIVATIONS, "relu", "leaky_relu", "tanh", "sigmoid", "identity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckSpec:
    """A bottleneck adapter behind an attention or feed-forward, which reads x and would give x + h:
    `x + h + scale * (b @ act(a @ z + a_bias) + b_bias)`.

    Tensors: `a [rank, hidden]`, `a_bias [rank]`, `b [hidden, rank]`, `b_bias [hidden]`; with scales, which
    are multiplied with `scale` too, `scales [scales]`.

    Attributes:
      rank: columns of the bottleneck.
      activation: one of BOTTLENECK_ACTIVATIONS.
      reads: what z is: "sum", x + h (Pfeiffer, arXiv 2005.00247); "output", h (Houlsby, arXiv 1902.00751);
        "input", x (parallel adapters, arXiv 2110.04366).
      scale: constant.
      scales: how many learned scales there are: 0, 1 or the hidden size.
    """

    kind: ClassVar[str] = "bottleneck"
    rank: int
    activation: str
    reads: str
    scale: float = 1.0
    scales: int = 0

    def __post_init__(self):
        if self.activation not in BOTTLENECK_ACTIVATIONS or self.reads not in BOTTLENECK_INPUTS:
            raise SpecError(
                f"a bottleneck with activation {self.activation!r} that reads {self.reads!r} is not known; "
                f"known: {', '.join(BOTTLENECK_ACTIVATIONS)}; {', '.join(BOTTLENECK_INPUTS)}"
            )

    @property
    def target(self) -> str:
        """Name of its slot tables, one set for each way to compute."""
        return f"{self.kind}.{self.reads}.{self.activation}"

    def tensors(self, base: ComponentSpec) -> Shapes:
        """See `LoraSpec.tensors`."""
        fits = isinstance(base, (AttentionSpec, FfnSpec)) and base.pre_norm and not base.post_norm
        if not fits or getattr(base, "parallel", False):
            raise SpecError(
                f"a bottleneck belongs behind an attention or ffn that adds to what it read, not to this "
                f"{base.kind} component"
            )
        d = base.hidden_size
        if self.scales not in (0, 1, d):
            raise SpecError(f"a bottleneck has 0, 1 or {d} learned scales, not {self.scales}")
        shapes: Shapes = {"a": (self.rank, d), "a_bias": (self.rank,), "b": (d, self.rank)}
        return shapes | {"b_bias": (d,)} | ({"scales": (self.scales,)} if self.scales else {})


DeltaSpec = (
    LoraSpec
    | Ia3Spec
    | BiasNormSpec
    | PromptSpec
    | PrefixSpec
    | BottleneckSpec
    | LowRankSpec
    | BitDeltaSpec
)
KINDS: dict[str, Any] = {cls.kind: cls for cls in typing.get_args(DeltaSpec)}


def delta_to_json(spec: DeltaSpec) -> dict[str, Any]:
    """Plain JSON of a delta's spec; see `spec.spec_to_json`."""
    if isinstance(spec, (LowRankSpec, BitDeltaSpec)):
        return compressed_to_json(spec)
    if isinstance(spec, LoraSpec):
        targets = {n: fields_to_json(t) for n, t in sorted(spec.targets.items())}
        invocation = {"invocation": list(spec.invocation)} if spec.invocation else {}
        return {"kind": spec.kind, "targets": targets} | invocation
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields_to_json(spec).items()}
    return {"kind": spec.kind, **plain}


def delta_from_json(data: Mapping[str, Any]) -> DeltaSpec:
    """Inverse of `delta_to_json`.

    Raises:
      SpecError: an unknown kind, or fields that do not fit it.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise SpecError(f"delta kind {kind!r} is not known; known: {', '.join(KINDS)}")
    try:
        if kind in (LowRankSpec.kind, BitDeltaSpec.kind):
            return compressed_from_json(data)
        if kind == LoraSpec.kind:
            targets = {n: LoraTarget(**t) for n, t in fields.pop("targets").items()}
            return LoraSpec(
                targets=targets, invocation=tuple(fields.pop("invocation", ())), **fields
            )
        return KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, KeyError, AttributeError) as e:
        raise SpecError(f"delta of kind {kind!r} has missing or unknown fields: {e}") from e
