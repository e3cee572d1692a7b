"""What a family declares, and how a declaration and a config become the steps of a chain.

A family is one short file that fills in `Family`; the package finds it by itself. All are decoders
whose layers are one attention and one feed-forward, dense or a mixture of experts.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    ExpertSpec,
    FfnSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    UnembeddingSpec,
)
from jblock.families import config as cfg
from jblock.families.multimodal import text_config, wrapper_of
from jblock.families.names import LLAMA, Names
from jblock.families.rope import original_positions, rope

Config = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# Last parts of names under which releases of transformers have saved buffers, wherever they stood.
BUFFERS = frozenset(
    {
        "inv_freq",
        "original_inv_freq",
        "cos_cached",
        "sin_cached",
        "masked_bias",
        "causal_mask",
        "position_ids",
        "embed_scale",
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
      fused_with_previous: it runs with the step before it, never apart.
    """

    spec: ComponentSpec
    tensors: dict[str, str]
    layer: int | None = None
    fused_with_previous: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config promises about its checkpoint.

    Attributes:
      steps: embedding, then the layers, then norm, unembedding. A layer is an attention, and an ffn or
        a router with its experts.
      copies: names that a checkpoint may also carry, as bit-identical copies of another tensor.
      buffers: ends of names of tensors that a checkpoint may also carry and no model needs, as
        `is_buffer` reads them.
      max_position: longest sequence in tokens.
      vocab_size: rows of the embedding.
      optional_prefix: what some checkpoints leave out at the start of their names.
    """

    steps: tuple[PlannedStep, ...]
    copies: dict[str, str]
    max_position: int
    vocab_size: int
    optional_prefix: str = ""
    buffers: tuple[str, ...] = ()

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor that no step takes is a buffer: a mask, a rope table and the like, which the
        architecture computes from the config whatever the checkpoint says."""
        return name.rpartition(".")[2] in BUFFERS or name.endswith(self.buffers)

    def fitting(self, names: Collection[str]) -> "Plan":
        """The plan for a checkpoint with these tensors: without `optional_prefix`, if they lack it."""
        prefix, first = self.optional_prefix, self.steps[0].tensors["weight"]
        if not prefix or first in names or first.removeprefix(prefix) not in names:
            return self

        def bare(of: Mapping[str, str]) -> dict[str, str]:
            return {k.removeprefix(prefix): v.removeprefix(prefix) for k, v in of.items()}

        return dataclasses.replace(
            self,
            steps=tuple(dataclasses.replace(s, tensors=bare(s.tensors)) for s in self.steps),
            copies=bare(self.copies),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The experts of a layer.

    Attributes:
      num_experts: experts rows are sent to.
      top_k: experts a row is sent to.
      intermediate_size: columns of an expert's gate and up.
      normalize: the weights of a row's experts add up to 1.
      shared_size: columns of the shared expert's gate and up; 0 has none.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    shared_size: int = 0


def no_options(config: Config, layer: int) -> Mapping[str, Any]:
    """The rule of families whose attentions differ in nothing but their dimensions."""
    del config, layer
    return {}


def attention_bias(config: Config, layer: int = 0) -> Mapping[str, Any]:
    """The rule of families where the field `attention_bias` gives q, k, v and o biases."""
    del layer
    biased = cfg.flag(config, "attention_bias", False)
    return {"qkv_bias": biased, "o_bias": biased}


def mlp_bias(config: Config) -> Mapping[str, Any]:
    """The rule of families where the field `mlp_bias` gives a dense layer's projections biases."""
    return {"bias": cfg.flag(config, "mlp_bias", False)}


def no_mixture(config: Config, layer: int) -> Mixture | None:
    """The rule of families whose layers are all dense."""
    del config, layer
    return None


def plain_rope(config: Config, layer: int, head_dim: int) -> RopeSpec | None:
    """The rule of families with one rotary embedding, whose fields have their usual names."""
    del layer
    return rope(config, head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      name: what chains record ("llama").
      architectures: values of config.json's `architectures` it covers.
      model_types: values of `model_type` it covers when `architectures` is not given.
      names: component kind -> module of the component -> module of the checkpoint.
      fields: usual name of a config field (Llama's) -> its name here.
      fixed: config field -> values it may have; anything else would change the maths.
      head_dim: width of a head when the config has none; None: hidden_size / heads.
      num_kv_heads: key/value heads when the config lacks the field; None: as many as query heads.
      eps: epsilon of norms when the config has none.
      activation: the activation when the config names none, as the config would.
      activations: what a config may name -> what it means.
      tied: whether the unembedding is tied when the config does not say.
      norm: kind of all norms.
      attention: fields of AttentionSpec that are the same in every layer.
      attention_options: (config, layer) -> fields of AttentionSpec that depend on them.
      rope: (config, layer, head_dim) -> the rotary embedding, None for none.
      ffn: fields of FfnSpec that are the same in every model.
      ffn_options: config -> fields of FfnSpec that depend on it.
      intermediate: config -> columns of a dense layer; None: its field intermediate_size.
      mixture: (config, layer) -> the experts of the layer; None: the layer is dense.
      embedding: config -> fields of EmbeddingSpec beside its dimensions.
      unembedding: config -> fields of UnembeddingSpec beside its dimensions.
      buffers: ends of names of tensors, beside BUFFERS, that old checkpoints carry and no model needs.
      optional_prefix: what some checkpoints leave out at the start of their tensors' names.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    names: Names = dataclasses.field(default_factory=lambda: LLAMA)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    num_kv_heads: int | None = None
    eps: float = 1e-6
    activation: str = "silu"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)
    tied: bool = False
    norm: str = "rms"
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_options: Callable[[Config, int], Mapping[str, Any]] = no_options
    rope: Callable[[Config, int, int], RopeSpec | None] = plain_rope
    ffn: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ffn_options: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    intermediate: Callable[[Config], int] | None = None
    mixture: Callable[[Config, int], Mixture | None] = no_mixture
    embedding: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    unembedding: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    buffers: tuple[str, ...] = ()
    optional_prefix: str = "model."

    def plan(self, config: Config) -> Plan:
        """Lays out the steps of a checkpoint with this config, or of the text model inside it.

        Raises:
          ConfigError: a field that is missing, malformed or not served.
          SpecError: dimensions that do not fit each other.
        """
        wrapper = wrapper_of(config)
        if wrapper is not None:
            config = text_config(config, wrapper)
        for field, allowed in self.fixed.items():
            cfg.require(config, field, allowed, f"family {self.name}")
        if config.get("quantization_config"):
            raise cfg.ConfigError(
                "config.json has a quantization_config; only float32, float16 and bfloat16 weights "
                "can be served: convert the unquantized checkpoint"
            )
        table = {
            "vocab_size": cfg.integer(config, "vocab_size"),
            "hidden_size": cfg.integer(config, self.field("hidden_size")),
        }
        positions = cfg.integer(config, self.field("max_position_embeddings"))
        steps = [self._step(EmbeddingSpec(**table, **self.embedding(config)))]
        # The bound keeps a mistyped number from making a plan as large as the memory.
        layers = cfg.integer(config, self.field("num_hidden_layers"), most=10_000)
        for i in range(layers):
            attention = self._attention(config, i)
            steps += [self._step(attention, i), *self._feed_forward(config, i, attention.parallel)]
        norm = NormSpec(hidden_size=table["hidden_size"], eps=self._eps(config), norm=self.norm)
        head = self._step(UnembeddingSpec(**table, **self.unembedding(config)))
        tied = cfg.flag(config, "tie_word_embeddings", self.tied)
        copies = {}
        if tied:
            embedded = {"weight": steps[0].tensors["weight"]}
            copies = {head.tensors["weight"]: embedded["weight"]}
            head = dataclasses.replace(head, tensors=embedded)
        return Plan(
            steps=(*steps, self._step(norm), head),
            copies=copies,
            max_position=min(positions, self._longest(config, steps, positions)),
            vocab_size=table["vocab_size"],
            optional_prefix=self.optional_prefix,
            buffers=self.buffers,
        )

    def _longest(self, config: Config, steps: list[PlannedStep], positions: int) -> int:
        """Tokens up to which the factors of longrope hold."""
        ropes = [s.spec.rope for s in steps if isinstance(s.spec, AttentionSpec)]
        if not any(r is not None and r.kind == "longrope" for r in ropes):
            return positions
        sections = (config.get(f) or {} for f in ("rope_parameters", "rope_scaling"))
        return original_positions(config, next((s for s in sections if s), {}))

    def field(self, usual: str) -> str:
        """What a config field is called here."""
        return self.fields.get(usual, usual)

    def _step(
        self,
        spec: ComponentSpec,
        layer: int | None = None,
        *,
        fused_with_previous: bool = False,
        names: str = "",
        expert: int = 0,
    ) -> PlannedStep:
        modules, tensors = self.names[names or spec.kind], {}
        for name in spec.tensors():
            module, _, tensor = name.rpartition(".")
            tensors[name] = f"{modules[module].format(i=layer, e=expert)}.{tensor}"
        return PlannedStep(
            spec=spec, tensors=tensors, layer=layer, fused_with_previous=fused_with_previous
        )

    def _eps(self, config: Config) -> float:
        return cfg.number(config, self.field("rms_norm_eps"), self.eps)

    def _attention(self, config: Config, i: int) -> AttentionSpec:
        hidden = cfg.integer(config, self.field("hidden_size"))
        heads = cfg.integer(config, self.field("num_attention_heads"))
        head_dim = self.head_dim
        if head_dim is None and config.get("head_dim") is None:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                raise cfg.ConfigError(
                    f"config.json: {self.field('hidden_size')} {hidden} is not a multiple of "
                    f"{self.field('num_attention_heads')} {heads} and there is no head_dim: add it"
                )
        head_dim = cfg.integer(config, "head_dim", head_dim)
        kv_heads = heads  # what null means in every family
        if self.num_kv_heads is not None and "num_key_value_heads" not in config:
            kv_heads = self.num_kv_heads
        return AttentionSpec(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=cfg.integer(config, "num_key_value_heads", kv_heads),
            head_dim=head_dim,
            norm_eps=self._eps(config),
            rope=self.rope(config, i, head_dim),
            norm=self.norm,
            **{**self.attention, **self.attention_options(config, i)},
        )

    def _feed_forward(self, config: Config, i: int, fused_with_previous: bool) -> list[PlannedStep]:
        hidden, eps = cfg.integer(config, self.field("hidden_size")), self._eps(config)
        activation = cfg.one_of(config, self.field("hidden_act"), self.activations, self.activation)
        mixture = self.mixture(config, i)
        if mixture is None:
            width = self.intermediate(config) if self.intermediate else None
            ffn = FfnSpec(
                hidden_size=hidden,
                intermediate_size=width or cfg.integer(config, "intermediate_size"),
                norm_eps=eps,
                activation=activation,
                norm=self.norm,
                **{**self.ffn, **self.ffn_options(config)},
            )
            return [self._step(ffn, i, fused_with_previous=fused_with_previous)]
        router = RouterSpec(
            hidden_size=hidden,
            num_experts=mixture.num_experts,
            top_k=mixture.top_k,
            norm_eps=eps,
            normalize=mixture.normalize,
            shared=bool(mixture.shared_size),
        )
        expert = ExpertSpec(
            hidden_size=hidden,
            intermediate_size=mixture.intermediate_size,
            activation=activation,
        )
        steps = [self._step(router, i, fused_with_previous=fused_with_previous)]
        steps += [
            self._step(expert, i, fused_with_previous=True, expert=e)
            for e in range(mixture.num_experts)
        ]
        if mixture.shared_size:
            shared = dataclasses.replace(expert, intermediate_size=mixture.shared_size)
            steps.append(self._step(shared, i, fused_with_previous=True, names="shared_expert"))
        return steps
