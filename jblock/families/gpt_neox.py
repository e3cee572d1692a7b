"""GPT-NeoX and Pythia (arXiv 2204.06745): LayerNorm, biases, rope over part of a head, q, k and v in one
projection head by head, and a feed-forward beside the attention instead of behind it."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.names import in_layers
from jblock.families.rope import RopeSpec, rope


def _options(config: Config, layer: int) -> dict[str, bool]:
    del layer
    biased = cfg.flag(config, "attention_bias", True)
    parallel = cfg.flag(config, "use_parallel_residual", True)
    return {"qkv_bias": biased, "o_bias": biased, "parallel": parallel}


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec:
    del layer
    return rope(
        config,
        head_dim,
        theta_field="rotary_emb_base",
        partial=0.25,
        partial_field="rotary_pct",
    )


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    names={
        "embedding": {"": "gpt_neox.embed_in"},
        **in_layers(
            "gpt_neox.layers.{i}.",
            attention={
                "norm": "input_layernorm",
                "qkv": "attention.query_key_value",
                "o": "attention.dense",
            },
            ffn={
                "norm": "post_attention_layernorm",
                "up": "mlp.dense_h_to_4h",
                "down": "mlp.dense_4h_to_h",
            },
        ),
        "norm": {"": "gpt_neox.final_layer_norm"},
        "unembedding": {"": "embed_out"},
    },
    fields={"rms_norm_eps": "layer_norm_eps"},
    eps=1e-5,
    activation="gelu",
    norm="layer",
    attention={"qkv": "by_head"},
    attention_options=_options,
    rope=_rope,
    ffn={"gated": False, "bias": True},
    buffers=(".attention.bias",),
    optional_prefix="gpt_neox.",
    fixed={"num_key_value_heads": (), "head_dim": (), "is_decoder": (True, False)},
)
