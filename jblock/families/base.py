"""What a family declares, and how a declaration and a config become the steps of a chain.

A family is one short file that fills in `Family`; the package finds it by itself. The common case
is a pre-norm decoder whose layers are one attention and one gated feed-forward, which is what
`Family.plan` lays out.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    UnembeddingSpec,
)
from jblock.families import config as cfg

Config = Mapping[str, Any]

# The names Llama gave its tensors; later families kept them. `{i}` is the layer.
_LAYER = "model.layers.{i}."
EMBEDDING = types.MappingProxyType({"weight": "model.embed_tokens.weight"})
ATTENTION = types.MappingProxyType(
    {
        "norm.weight": _LAYER + "input_layernorm.weight",
        "q.weight": _LAYER + "self_attn.q_proj.weight",
        "k.weight": _LAYER + "self_attn.k_proj.weight",
        "v.weight": _LAYER + "self_attn.v_proj.weight",
        "o.weight": _LAYER + "self_attn.o_proj.weight",
    }
)
QKV_BIAS = types.MappingProxyType(
    {f"{p}.bias": f"{_LAYER}self_attn.{p}_proj.bias" for p in ("q", "k", "v")}
)
QK_NORM = types.MappingProxyType(
    {f"{p}_norm.weight": f"{_LAYER}self_attn.{p}_norm.weight" for p in ("q", "k")}
)
FFN = types.MappingProxyType(
    {
        "norm.weight": _LAYER + "post_attention_layernorm.weight",
        "gate.weight": _LAYER + "mlp.gate_proj.weight",
        "up.weight": _LAYER + "mlp.up_proj.weight",
        "down.weight": _LAYER + "mlp.down_proj.weight",
    }
)
NORM = types.MappingProxyType({"weight": "model.norm.weight"})
UNEMBEDDING = types.MappingProxyType({"weight": "lm_head.weight"})
# Module path of a projection in the checkpoint -> (component kind, projection). What adapters name.
PROJECTIONS = types.MappingProxyType(
    {
        **{_LAYER + f"self_attn.{p}_proj": ("attention", p) for p in ("q", "k", "v", "o")},
        **{_LAYER + f"mlp.{p}_proj": ("ffn", p) for p in ("gate", "up", "down")},
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One component to take from a checkpoint.

    Attributes:
      spec: what it computes.
      tensors: tensor name in the component -> name in the checkpoint. A name that an earlier step
        has taken already is tied: stored as a reference.
      layer: index of the layer it belongs to, None outside the layers.
    """

    spec: ComponentSpec
    tensors: dict[str, str]
    layer: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config promises about its checkpoint.

    Attributes:
      steps: embedding, then attention and ffn of every layer, then norm, unembedding.
      copies: names that a checkpoint may also carry, as bit-identical copies of another tensor.
      inverse_frequencies: names of rope tables that old checkpoints carry though the config says
        the same; checked against it and left out.
      max_position: longest sequence in tokens.
      vocab_size: rows of the embedding.
    """

    steps: tuple[PlannedStep, ...]
    copies: dict[str, str]
    inverse_frequencies: tuple[str, ...]
    max_position: int
    vocab_size: int


def no_window(config: Config, layer: int) -> int | None:
    """The rule of families whose tokens see everything before them."""
    del config, layer
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      name: what chains record ("llama").
      architectures: values of config.json's `architectures` it covers.
      model_types: values of `model_type` it covers when `architectures` is not given.
      qkv_bias: biases on q, k and v.
      qk_norm: RMSNorm on q and k per head.
      head_dim: width of a head when the config has none; None: hidden_size / heads.
      num_kv_heads: key/value heads when the config lacks the field; None: as many as query heads.
      sliding_window: (config, layer) -> window in tokens or None.
      fixed: config field -> values it may have; anything else would change the maths.
      projections: module path with `{i}` -> (component kind, projection), for adapters.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    num_kv_heads: int | None = None
    sliding_window: Callable[[Config, int], int | None] = no_window
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    projections: Mapping[str, tuple[str, str]] = dataclasses.field(
        default_factory=lambda: PROJECTIONS
    )

    def plan(self, config: Config) -> Plan:
        """Lays out the steps of a checkpoint with this config.

        Raises:
          ConfigError: a field that is missing, malformed or not served.
          SpecError: dimensions that do not fit each other.
        """
        for field, allowed in self.fixed.items():
            cfg.require(config, field, allowed, f"family {self.name}")
        cfg.require(config, "hidden_act", ("silu", "swish"), "other activations are not known")
        if config.get("quantization_config"):
            raise cfg.ConfigError(
                "config.json has a quantization_config; only float32, float16 and bfloat16 weights "
                "can be served: convert the unquantised checkpoint"
            )
        vocab, hidden = cfg.integer(config, "vocab_size"), cfg.integer(config, "hidden_size")
        embedding = PlannedStep(
            spec=EmbeddingSpec(vocab_size=vocab, hidden_size=hidden), tensors=dict(EMBEDDING)
        )
        steps = [embedding]
        # The bound keeps a mistyped number from making a plan as large as the memory.
        layers = cfg.integer(config, "num_hidden_layers", most=10_000)
        for i in range(layers):
            steps += self._layer(config, i)
        eps = cfg.number(config, "rms_norm_eps", 1e-6)
        norm = NormSpec(hidden_size=hidden, eps=eps)
        head = UnembeddingSpec(vocab_size=vocab, hidden_size=hidden)
        tied = cfg.flag(config, "tie_word_embeddings", False)
        steps += [
            PlannedStep(spec=norm, tensors=dict(NORM)),
            PlannedStep(spec=head, tensors=dict(EMBEDDING if tied else UNEMBEDDING)),
        ]
        return Plan(
            steps=tuple(steps),
            copies={UNEMBEDDING["weight"]: EMBEDDING["weight"]} if tied else {},
            inverse_frequencies=tuple(
                f"{_LAYER.format(i=i)}self_attn.rotary_emb.inv_freq" for i in range(layers)
            ),
            max_position=cfg.integer(config, "max_position_embeddings"),
            vocab_size=vocab,
        )

    def _layer(self, config: Config, i: int) -> list[PlannedStep]:
        hidden = cfg.integer(config, "hidden_size")
        heads = cfg.integer(config, "num_attention_heads")
        head_dim = self.head_dim
        if head_dim is None and config.get("head_dim") is None:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                raise cfg.ConfigError(
                    f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads "
                    f"{heads} and there is no head_dim: add it"
                )
        kv_heads = heads  # what null means in every family
        if self.num_kv_heads is not None and "num_key_value_heads" not in config:
            kv_heads = self.num_kv_heads
        eps = cfg.number(config, "rms_norm_eps", 1e-6)
        attention = AttentionSpec(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=cfg.integer(config, "num_key_value_heads", kv_heads),
            head_dim=cfg.integer(config, "head_dim", head_dim),
            norm_eps=eps,
            rope=cfg.rope(config),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            sliding_window=self.sliding_window(config, i),
        )
        names = {
            **ATTENTION,
            **(QKV_BIAS if self.qkv_bias else {}),
            **(QK_NORM if self.qk_norm else {}),
        }
        ffn = FfnSpec(
            hidden_size=hidden,
            intermediate_size=cfg.integer(config, "intermediate_size"),
            norm_eps=eps,
        )
        return [
            PlannedStep(spec=attention, tensors=_at(names, i), layer=i),
            PlannedStep(spec=ffn, tensors=_at(FFN, i), layer=i),
        ]


def layer_types_window(config: Config, layer: int) -> int | None:
    """Qwen's rule: layers from max_window_layers on slide, if use_sliding_window says so.

    `layer_types`, which transformers 5 writes, must say the same or is followed where the older
    fields leave it open.

    Raises:
      ConfigError: layer types that are not known or contradict the other fields.
    """
    types_ = config.get("layer_types")
    layers = cfg.integer(config, "num_hidden_layers")
    known = ("full_attention", "sliding_attention")
    if types_ is not None and (
        not isinstance(types_, list) or len(types_) != layers or any(t not in known for t in types_)
    ):
        raise cfg.ConfigError(
            f"config.json: layer_types is {types_!r}; give one of {known} for each of the {layers} "
            "layers, or remove it"
        )
    window = None
    if cfg.flag(config, "use_sliding_window", False) and config.get("sliding_window") is not None:
        window = cfg.integer(config, "sliding_window")
    if types_ is not None:
        slides = types_[layer] == "sliding_attention"
    else:
        slides = window is not None and layer >= cfg.integer(
            config, "max_window_layers", 28, least=0
        )
    if slides and window is None:
        raise cfg.ConfigError(
            f"config.json: layer_types[{layer}] is 'sliding_attention' but use_sliding_window is "
            f"{config.get('use_sliding_window')!r} and sliding_window "
            f"{config.get('sliding_window')!r}: set both, or make the layer 'full_attention'"
        )
    return window if slides else None


def _at(names: Mapping[str, str], i: int) -> dict[str, str]:
    return {name: source.format(i=i) for name, source in names.items()}
