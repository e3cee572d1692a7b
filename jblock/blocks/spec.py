"""Component specs: everything about a component except its weights.

A spec is a frozen dataclass that fixes which tensors a component owns, their shapes, and the maths
that runs over them. It is plain data: this file imports neither jax nor the zoo, so the converter,
the scheduler and the engine all speak the same words.

Tensors keep the orientation and the fusion of the Hugging Face checkpoint (mostly `[out, in]`, one
tensor a projection), so that storing, hashing and exporting a component never rewrites a byte of it;
`layout.py` says what the blocks compute with.
"""

import dataclasses
from typing import Any, ClassVar

from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.rope_spec import RopeSpec, SpecError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NORMS = ("rms", "rms_plus_one", "layer", "layer_no_bias")
# The names that stored specs, and so the ids of components, have for them; see `spec_json`.
_STORED_TRANSPOSED = {"stored_as": "in_out"}
_STORED_NORMALIZE = {"stored_as": "normalise"}
QKV_LAYOUTS = ("apart", "joined", "by_head")


def norm_tensors(norm: str, name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a norm called `name`: a weight, and a bias where it is "layer".

    "rms" is RMSNorm (arXiv 1910.07467), "rms_plus_one" one that scales by 1 + weight (Gemma), "layer"
    is LayerNorm (arXiv 1607.06450), "layer_no_bias" LayerNorm without its bias (Cohere).
    """
    if norm not in NORMS:
        raise SpecError(f"norm {norm!r} is not known; known: {', '.join(NORMS)}")
    shapes: dict[str, tuple[int, ...]] = {f"{name}weight": (width,)}
    if norm == "layer":
        shapes[f"{name}bias"] = (width,)
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """Token ids to hidden rows: `scale * weight[id] + positions.weight[position]`.

    Tensors: `weight [vocab_size, hidden_size]`, `positions.weight [num_positions, hidden_size]`.

    Attributes:
      vocab_size: rows of the table.
      hidden_size: width of the register it writes.
      num_positions: rows of the table of learned positions (GPT-2); 0 has none.
      scale: multiplies the token's row, rounded to the serving dtype first (Gemma).
    """

    kind: ClassVar[str] = "embedding"
    vocab_size: int
    hidden_size: int
    num_positions: int = 0
    scale: float = 1.0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.vocab_size, self.hidden_size)}
        if self.num_positions:
            shapes["positions.weight"] = (self.num_positions, self.hidden_size)
        return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Self attention with its residual: `x + post(o(attend(q(n(x)), k(n(x)), v(n(x)))))`.

    Attributes:
      hidden_size: width of the register it reads and writes.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides num_heads.
      head_dim: width of one head; free, not tied to hidden_size / num_heads.
      norm_eps: epsilon of every norm in it.
      rope: rotary embedding of queries and keys; None has none.
      qkv_bias: biases on q, k and v (Qwen2).
      qk_norm: norm on q and k before rope, over each head (Qwen3) unless qk_norm_joint.
      sliding_window: a token sees itself and the sliding_window - 1 tokens before it (Mistral);
        None sees everything.
      norm: kind of every norm in it, as in `norm_tensors`.
      pre_norm: a norm before the projections.
      post_norm: a norm on what is added to the residual (Gemma 2, OLMo 2).
      qk_norm_joint: q and k are each normed over all their heads together (OLMo 2).
      o_bias: a bias on o.
      scale: of the scores; None is 1 / sqrt(head_dim).
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); None leaves them.
      qkv: how the checkpoint lays q, k and v out: "apart"; "joined" as one projection "qkv", q's rows
        first, then k's, then v's (Phi-3); "by_head" as one, for each head its q, k and v (GPT-NeoX).
      transposed: projections are stored [in, out] (GPT-2's Conv1D) instead of [out, in].
      parallel: the ffn behind it reads what this one read, not what it wrote (GPT-NeoX).
      shared_norm: with parallel, the ffn reads what this one's norm made of that (Cohere), and has no
        norm of its own.
      residual_scale: multiplies what is added to the residual (Granite).
      log_scale_beta: queries at position p are multiplied by
        1 + log_scale_beta * log(1 + floor(p / log_scale_positions)) (Ministral 3); 0 leaves them.
      log_scale_positions: see log_scale_beta.
      quant: how the projections are quantized; None: they are as the checkpoint had them.
    """

    kind: ClassVar[str] = "attention"
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec | None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm_joint: bool = False
    o_bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    qkv: str = "apart"
    transposed: bool = dataclasses.field(default=False, metadata=_STORED_TRANSPOSED)
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    log_scale_beta: float = 0.0
    log_scale_positions: int = 0
    quant: QuantSpec | None = None

    def __post_init__(self):
        _check_quant(self)
        if self.num_heads % self.num_kv_heads:
            raise SpecError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.qkv not in QKV_LAYOUTS:
            raise SpecError(f"qkv {self.qkv!r} is not known; known: {', '.join(QKV_LAYOUTS)}")
        if self.qkv == "by_head" and self.num_heads != self.num_kv_heads:
            raise SpecError(
                f"qkv by head needs as many key/value heads as heads, not {self.num_kv_heads} and "
                f"{self.num_heads}"
            )
        if self.shared_norm and not (self.parallel and self.pre_norm):
            raise SpecError("shared_norm needs parallel and pre_norm: there is no norm to share")
        if self.log_scale_beta and self.log_scale_positions < 1:
            raise SpecError(
                f"log_scale_positions is {self.log_scale_positions!r}; log_scale_beta needs at least 1"
            )
        if self.rope is not None and self.head_dim % 2 and not self.rope.dim:
            raise SpecError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        if self.rope is not None:
            self.rope.rotated(self.head_dim)

    @property
    def widths(self) -> dict[str, int]:
        """Columns of q, k and v."""
        kv = self.num_kv_heads * self.head_dim
        return {"q": self.num_heads * self.head_dim, "k": kv, "v": kv}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, widths = self.hidden_size, self.widths
        outs = widths if self.qkv == "apart" else {"qkv": sum(widths.values())}
        shapes = norm_tensors(self.norm, "norm.", d) if self.pre_norm else {}
        shapes |= {f"{p}.weight": _matrix(out, d, self.transposed) for p, out in outs.items()}
        shapes["o.weight"] = _matrix(d, widths["q"], self.transposed)
        if self.qkv_bias:
            shapes |= {f"{p}.bias": (out,) for p, out in outs.items()}
        if self.o_bias:
            shapes["o.bias"] = (d,)
        for p in ("q", "k") if self.qk_norm else ():
            width = widths[p] if self.qk_norm_joint else self.head_dim
            shapes |= norm_tensors(self.norm, f"{p}_norm.", width)
        shapes |= norm_tensors(self.norm, "post_norm.", d) if self.post_norm else {}
        return _quantized(shapes, self.quant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnSpec:
    """Feed-forward with its residual: `x + post(down(act(gate(n(x))) * up(n(x))))`.

    Attributes:
      hidden_size: width of the register it reads and writes.
      intermediate_size: columns of gate and up.
      norm_eps: epsilon of every norm in it.
      activation: one of ACTIVATIONS; "gelu_tanh" is the approximation with tanh.
      norm: kind of every norm in it, as in `norm_tensors`.
      pre_norm: a norm before the projections.
      post_norm: a norm on what is added to the residual.
      gated: without a gate it is `down(act(up(n(x))))`.
      bias: biases on every projection.
      joined: the checkpoint has gate and up as one projection "gate_up", gate's rows first (Phi-3).
      transposed: projections are stored [in, out] (GPT-2's Conv1D) instead of [out, in].
      residual_scale: multiplies what is added to the residual (Granite).
      quant: how the projections are quantized; None: they are as the checkpoint had them.
    """

    kind: ClassVar[str] = "ffn"
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    activation: str = "silu"
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    gated: bool = True
    bias: bool = False
    joined: bool = False
    transposed: bool = dataclasses.field(default=False, metadata=_STORED_TRANSPOSED)
    residual_scale: float = 1.0
    quant: QuantSpec | None = None

    def __post_init__(self):
        _check_activation(self.activation)
        _check_quant(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, f = self.hidden_size, self.intermediate_size
        outs = {"gate": f, "up": f} if self.gated else {"up": f}
        if self.joined:
            outs = {"gate_up": sum(outs.values())}
        shapes = norm_tensors(self.norm, "norm.", d) if self.pre_norm else {}
        shapes |= {f"{p}.weight": _matrix(out, d, self.transposed) for p, out in outs.items()}
        shapes["down.weight"] = _matrix(d, f, self.transposed)
        if self.bias:
            shapes |= {f"{p}.bias": (out,) for p, out in outs.items()} | {"down.bias": (d,)}
        shapes |= norm_tensors(self.norm, "post_norm.", d) if self.post_norm else {}
        return _quantized(shapes, self.quant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """What sends each row to some experts: `x + sum(w_e * expert_e(n(x)))` over the `top_k` experts of
    largest router probability. The experts are the components behind it, in order.

    Attributes:
      hidden_size: width of the register it reads and writes.
      num_experts: experts behind it that rows are sent to.
      top_k: experts a row is sent to.
      norm_eps: epsilon of the norm.
      normalize: the weights of a row's experts are made to add up to 1.
      shared: one more expert, behind the others, sees every row; its output is multiplied by
        sigmoid(shared_gate(n(x))) (Qwen2-MoE).
    """

    kind: ClassVar[str] = "router"
    hidden_size: int
    num_experts: int
    top_k: int
    norm_eps: float
    normalize: bool = dataclasses.field(default=False, metadata=_STORED_NORMALIZE)
    shared: bool = False

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num_experts:
            raise SpecError(
                f"top_k {self.top_k} does not fit num_experts {self.num_experts}; give 1 to "
                f"{self.num_experts}"
            )

    @property
    def followers(self) -> int:
        """Expert components that belong to it."""
        return self.num_experts + self.shared

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d = self.hidden_size
        shapes = norm_tensors("rms", "norm.", d) | {"router.weight": (self.num_experts, d)}
        return shapes | ({"shared_gate.weight": (1, d)} if self.shared else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """One expert of a mixture: `down(act(gate(x)) * up(x))`, without norm and residual; `quant` as in
    FfnSpec."""

    kind: ClassVar[str] = "expert"
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    quant: QuantSpec | None = None

    def __post_init__(self):
        _check_activation(self.activation)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, f = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (f, d), "up.weight": (f, d)}
        return _quantized(shapes | {"down.weight": (d, f)}, self.quant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm on its own: the final norm, of a kind as in `norm_tensors`."""

    kind: ClassVar[str] = "norm"
    hidden_size: int
    eps: float
    norm: str = "rms"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        return norm_tensors(self.norm, "", self.hidden_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnembeddingSpec:
    """Hidden rows to logits. Tensors: `weight [vocab_size, hidden_size]`.

    A tied unembedding owns no tensor: its record refers to the embedding component's `weight`.

    Attributes:
      vocab_size: logits of a row.
      hidden_size: width of the register it reads.
      softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None leaves them.
      scale: multiplies the logits (Cohere, Granite), before the softcap.
    """

    kind: ClassVar[str] = "unembedding"
    vocab_size: int
    hidden_size: int
    softcap: float | None = None
    scale: float = 1.0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component needs (its own, or by reference)."""
        return {"weight": (self.vocab_size, self.hidden_size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StitchSpec:
    """Joins lower layers of one model to upper layers of another, at any of several depths p:
    `proj(g) + bias[p] + down(silu(up(norm(g))))` with `g = gain[p] * x` (after the stitching blocks of
    arXiv 2404.18322, section 4.2).

    Tensors: `position.gain [depths, hidden_size]`, `position.bias [depths, output_size]`,
    `proj.weight [output_size, hidden_size]`, `norm.weight [hidden_size]`, `up.weight [inner_size,
    hidden_size]`, `down.weight [output_size, inner_size]`.

    Attributes:
      hidden_size: width of the register it reads.
      output_size: width of the register it writes.
      inner_size: columns of up.
      depths: how many attention layers may lie below it in a chain; their order is that of the position
        tables.
      norm_eps: epsilon of the norm.
    """

    kind: ClassVar[str] = "stitch"
    hidden_size: int
    output_size: int
    inner_size: int
    depths: tuple[int, ...]
    norm_eps: float

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 0:
            raise SpecError(f"depths {list(self.depths)}: give some numbers of layers, ascending")

    def position(self, depth: int) -> int:
        """The row of the position tables for `depth` attention layers below.

        Raises:
          SpecError: it was not trained for that.
        """
        if depth not in self.depths:
            known = ", ".join(map(str, self.depths))
            raise SpecError(f"a stitch for depths {known} cannot stand behind {depth} layers")
        return self.depths.index(depth)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the component owns."""
        d, out, inner, count = self.hidden_size, self.output_size, self.inner_size, len(self.depths)
        return {
            "position.gain": (count, d),
            "position.bias": (count, out),
            "proj.weight": (out, d),
            "norm.weight": (d,),
            "up.weight": (inner, d),
            "down.weight": (out, inner),
        }


ComponentSpec = (
    EmbeddingSpec
    | AttentionSpec
    | FfnSpec
    | RouterSpec
    | ExpertSpec
    | NormSpec
    | UnembeddingSpec
    | StitchSpec
)
QUANTIZABLE = (AttentionSpec, FfnSpec, ExpertSpec)
LAYER_KINDS = ("attention", "ffn", "router", "expert")
KINDS: dict[str, Any] = {
    cls.kind: cls
    for cls in (
        EmbeddingSpec,
        AttentionSpec,
        FfnSpec,
        RouterSpec,
        ExpertSpec,
        NormSpec,
        UnembeddingSpec,
        StitchSpec,
    )
}


def projection_shape(spec: ComponentSpec, name: str) -> tuple[int, int]:
    """(out, in) of a projection, however it is stored: of a layer by its name, of an embedding, which
    takes a token to its row, or an unembedding by "weight".

    Raises:
      SpecError: the component has no projection of that name.
    """
    if name == "weight" and isinstance(spec, EmbeddingSpec):
        return spec.hidden_size, spec.vocab_size
    if name == "weight" and isinstance(spec, UnembeddingSpec):
        return spec.vocab_size, spec.hidden_size
    shape = unquantized(spec).tensors().get(f"{name}.weight", ())
    if spec.kind not in LAYER_KINDS or len(shape) != 2:
        raise SpecError(f"{name!r} is not a projection of a {spec.kind} component")
    out, inner = shape[::-1] if getattr(spec, "transposed", False) else shape
    return out, inner


def unquantized(spec: ComponentSpec) -> ComponentSpec:
    """The spec of the component that a quantized one stands for; any other as it is."""
    if isinstance(spec, QUANTIZABLE) and spec.quant is not None:
        return dataclasses.replace(spec, quant=None)
    return spec


def stored_dtype(spec: Any, name: str) -> str | None:
    """The dtype a tensor has to be stored in; None: any float."""
    quant = getattr(spec, "quant", None)
    return quant.dtype(name) if quant is not None else None


def _quantized(
    shapes: dict[str, tuple[int, ...]], quant: QuantSpec | None
) -> dict[str, tuple[int, ...]]:
    if quant is None:
        return shapes
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            out |= quant.tensors(name.removesuffix(".weight"), *shape)
        else:
            out[name] = shape
    return out


def _check_quant(spec: "AttentionSpec | FfnSpec") -> None:
    if spec.quant is not None and spec.transposed:
        raise SpecError("quantized projections are [out, in]: transposed has to be false")


def _matrix(out: int, inner: int, transposed: bool) -> tuple[int, int]:
    return (inner, out) if transposed else (out, inner)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise SpecError(f"activation {activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
