"""GLM-4-0414 (Z.ai, 2025): GLM-4 9B with norms behind attention and feed-forward too."""

from jblock.families.base import Family
from jblock.families.glm import biases, interleaved_half
from jblock.families.names import llama_but

FAMILY = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    names=llama_but(
        attention={"post_norm": "post_self_attn_layernorm"},
        ffn={"post_norm": "post_mlp_layernorm"},
    ),
    head_dim=128,
    num_kv_heads=2,
    eps=1.5625e-07,
    attention={"post_norm": True},
    attention_options=biases,
    rope=interleaved_half,
    ffn={"joined": True, "post_norm": True},
)
