"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): LayerNorm, biases,
learned positions, and matrices stored [in, out], q, k and v in one."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.names import in_layers


def _options(config: Config, layer: int) -> dict[str, float | None]:
    scale = None
    if not cfg.flag(config, "scale_attn_weights", True):
        scale = 1.0
    if cfg.flag(config, "scale_attn_by_inverse_layer_idx", False):
        width = cfg.integer(config, "n_embd") // cfg.integer(config, "n_head")
        scale = (scale or width**-0.5) / (layer + 1)
    return {"scale": scale}


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    names={
        "embedding": {"": "transformer.wte", "positions": "transformer.wpe"},
        **in_layers(
            "transformer.h.{i}.",
            attention={"norm": "ln_1", "qkv": "attn.c_attn", "o": "attn.c_proj"},
            ffn={"norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        ),
        "norm": {"": "transformer.ln_f"},
        "unembedding": {"": "lm_head"},
    },
    optional_prefix="transformer.",
    fields={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    eps=1e-5,
    activation="gelu_new",
    tied=True,
    norm="layer",
    attention={"qkv": "joined", "qkv_bias": True, "o_bias": True, "transposed": True},
    attention_options=_options,
    rope=lambda config, layer, head_dim: None,
    ffn={"gated": False, "bias": True, "transposed": True},
    intermediate=lambda config: cfg.integer(config, "n_inner", 4 * cfg.integer(config, "n_embd")),
    embedding=lambda config: {"num_positions": cfg.integer(config, "n_positions")},
    buffers=(".attn.bias",),
    fixed={"add_cross_attention": (False,), "num_key_value_heads": (), "head_dim": ()},
)
