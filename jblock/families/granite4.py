"""Granite 4 (IBM, 2025), its dense models: Granite 3 with gate and up in one projection, and rope where
the config asks for it.

The same architecture also covers hybrids with Mamba layers and mixtures of experts; these are refused.
"""

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.granite import (
    attention_options,
    embedding_options,
    residual_options,
    unembedding_options,
)
from jblock.families.names import llama_but
from jblock.families.rope import RopeSpec, rope

# transformers 5 writes "full_attention" for what is published as "attention".
_ATTENTION = ("attention", "full_attention")


def _options(config: Config, layer: int) -> dict[str, object]:
    field = "layers_block_type" if "layers_block_type" in config else "layer_types"
    types, layers = config.get(field), cfg.integer(config, "num_hidden_layers")
    if not isinstance(types, list) or len(types) != layers:
        raise cfg.ConfigError(
            f"config.json: {field} is {types!r}; give the type of each of the {layers} layers"
        )
    if types[layer] not in _ATTENTION:
        raise cfg.ConfigError(
            f"config.json: {field}[{layer}] is {types[layer]!r}; only layers of attention are served, so "
            "take a dense Granite 4 (the models with 'h' in their name are hybrids)"
        )
    return attention_options(config, layer)


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec | None:
    del layer
    kind = config.get("position_embedding_type")
    cfg.require(config, "position_embedding_type", ("rope", "nope"))
    return rope(config, head_dim) if kind == "rope" else None


FAMILY = Family(
    name="granite4",
    architectures=("GraniteMoeHybridForCausalLM",),
    model_types=("granitemoehybrid",),
    names=llama_but(ffn={"gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"}),
    attention_options=_options,
    rope=_rope,
    ffn={"joined": True},
    ffn_options=residual_options,
    intermediate=lambda config: cfg.integer(config, "shared_intermediate_size", 1024),
    embedding=embedding_options,
    unembedding=unembedding_options,
    fixed={"num_local_experts": (0,)},
)
