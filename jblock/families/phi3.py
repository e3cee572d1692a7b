"""Phi-3, 3.5 and 4 (arXiv 2404.14219): Llama with q, k, v in one projection, and gate and up in one.

The long-context releases stretch their rope by "longrope", whose factors for short sequences hold up to
`original_max_position_embeddings` tokens. Past that every key would have to be computed anew with other
factors, so serving ends there.
"""

from jblock.families.base import Family
from jblock.families.rope import rope
from jblock.families.windows import every_layer

FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    eps=1e-5,
    attention={"qkv": "joined"},
    attention_options=every_layer,
    rope=lambda config, layer, head_dim: rope(config, head_dim, partial=1.0),
    ffn={"joined": True},
    fixed={"attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
)
