"""Component specs: everything about a component except its weights.

A spec is a frozen dataclass that fixes which tensors a component owns, their shapes, and the maths
that runs over them. It is plain data: this file imports neither jax nor the zoo, so the converter,
the scheduler and the engine all speak the same words.

Tensors keep the orientation of the Hugging Face checkpoint (`[out, in]` for a projection), so that
storing, hashing and exporting a component never rewrites a byte of it.
"""

import dataclasses
import json
from typing import Any, ClassVar

ACTIVATIONS = ("silu",)
ROPE_KINDS = ("default", "llama3")


class SpecError(ValueError):
    """A spec that cannot be served: names the field, the value and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (arXiv 2104.09864), half-split layout as in Hugging Face Llama.

    Attributes:
      kind: "default", or "llama3" for the frequency bands of Llama 3.1 (the fields below).
      theta: base of the geometric sequence of wavelengths.
      factor: llama3: how much the long wavelengths are stretched.
      low_freq_factor: llama3: wavelengths over original_max_position / this are fully stretched.
      high_freq_factor: llama3: wavelengths under original_max_position / this are left alone.
      original_max_position: llama3: context length in tokens the model was first trained on.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise SpecError(f"rope kind {self.kind!r} is not known; known: {', '.join(ROPE_KINDS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """Token ids to hidden rows. Tensors: `weight [vocab_size, hidden_size]`."""

    kind: ClassVar[str] = "embedding"
    vocab_size: int
    hidden_size: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        return {"weight": (self.vocab_size, self.hidden_size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Pre-norm self attention with its residual: `x + o(attend(q(n(x)), k(n(x)), v(n(x))))`.

    Attributes:
      hidden_size: width of the register it reads and writes.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides num_heads.
      head_dim: width of one head; free, not tied to hidden_size / num_heads.
      norm_eps: epsilon of the RMSNorm before the projections (and of q/k norm).
      rope: rotary embedding of queries and keys.
      qkv_bias: biases on q, k and v (Qwen2).
      qk_norm: RMSNorm over head_dim on q and k before rope (Qwen3).
      sliding_window: a token sees itself and the sliding_window - 1 tokens before it (Mistral);
        None sees everything.
    """

    kind: ClassVar[str] = "attention"
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise SpecError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise SpecError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, q, kv = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        shapes: dict[str, tuple[int, ...]] = {
            "norm.weight": (d,),
            "q.weight": (q, d),
            "k.weight": (kv, d),
            "v.weight": (kv, d),
            "o.weight": (d, q),
        }
        if self.qkv_bias:
            shapes |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnSpec:
    """Pre-norm gated feed-forward with its residual: `x + down(act(gate(n(x))) * up(n(x)))`."""

    kind: ClassVar[str] = "ffn"
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    activation: str = "silu"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise SpecError(
                f"activation {self.activation!r} is not known; known: {', '.join(ACTIVATIONS)}"
            )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, f = self.hidden_size, self.intermediate_size
        return {
            "norm.weight": (d,),
            "gate.weight": (f, d),
            "up.weight": (f, d),
            "down.weight": (d, f),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """RMSNorm (arXiv 1910.07467) on its own: the final norm. Tensors: `weight [hidden_size]`."""

    kind: ClassVar[str] = "norm"
    hidden_size: int
    eps: float

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        return {"weight": (self.hidden_size,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnembeddingSpec:
    """Hidden rows to logits. Tensors: `weight [vocab_size, hidden_size]`.

    A tied unembedding owns no tensor: its record refers to the embedding component's `weight`.
    """

    kind: ClassVar[str] = "unembedding"
    vocab_size: int
    hidden_size: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component needs (its own, or by reference)."""
        return {"weight": (self.vocab_size, self.hidden_size)}


ComponentSpec = EmbeddingSpec | AttentionSpec | FfnSpec | NormSpec | UnembeddingSpec
_KINDS: dict[str, Any] = {
    cls.kind: cls for cls in (EmbeddingSpec, AttentionSpec, FfnSpec, NormSpec, UnembeddingSpec)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTarget:
    """LoRA on one projection: `y += scale * b @ (a @ x)`.

    Attributes:
      rank: inner width.
      scale: alpha / rank (or alpha / sqrt(rank) for rsLoRA), already worked out.
    """

    rank: int
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank delta (arXiv 2106.09685) on some projections of one component.

    Tensors, for every projection `p` in targets: `p.a [rank, in]` and `p.b [out, rank]`.

    Attributes:
      targets: projection name ("q", "k", "v", "o", "gate", "up", "down") -> its rank and scale.
    """

    kind: ClassVar[str] = "lora"
    targets: dict[str, LoraTarget]

    def tensors(self, base: ComponentSpec) -> dict[str, tuple[int, ...]]:
        """Name -> shape, for a delta on a component with spec `base`.

        Raises:
          SpecError: base has no projection of a target's name.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        base_shapes = base.tensors()
        for name, target in sorted(self.targets.items()):
            if f"{name}.weight" not in base_shapes:
                raise SpecError(
                    f"LoRA target {name!r} is not a projection of a {base.kind} component"
                )
            out, inner = base_shapes[f"{name}.weight"]
            shapes[f"{name}.a"] = (target.rank, inner)
            shapes[f"{name}.b"] = (out, target.rank)
        return shapes


DeltaSpec = LoraSpec


def spec_to_json(spec: ComponentSpec | DeltaSpec) -> dict[str, Any]:
    """Plain JSON of a spec. Fields at their default are left out, so that a field added later does
    not change the hash of what was stored before it existed."""
    if isinstance(spec, LoraSpec):
        targets = {n: dataclasses.asdict(t) for n, t in sorted(spec.targets.items())}
        return {"kind": spec.kind, "targets": targets}
    return {"kind": spec.kind, **_fields_to_json(spec)}


def _fields_to_json(value: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and item == field.default:
            continue
        out[field.name] = _fields_to_json(item) if dataclasses.is_dataclass(item) else item
    return out


def spec_from_json(data: dict[str, Any]) -> ComponentSpec | DeltaSpec:
    """Inverse of `spec_to_json`.

    Raises:
      SpecError: an unknown kind, or fields that do not fit it.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    try:
        if kind == LoraSpec.kind:
            return LoraSpec(targets={n: LoraTarget(**t) for n, t in fields["targets"].items()})
        if kind not in _KINDS:
            raise SpecError(
                f"component kind {kind!r} is not known; known: {', '.join(_KINDS)}, lora"
            )
        if "rope" in fields:
            fields["rope"] = RopeSpec(**fields["rope"])
        return _KINDS[kind](**fields)
    except (TypeError, KeyError, AttributeError) as e:
        raise SpecError(f"spec of kind {kind!r} has missing or unknown fields: {e}") from e


def canonical_json(data: Any) -> str:
    """One spelling per value: sorted keys, no spaces. What hashes and signatures are taken over."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
