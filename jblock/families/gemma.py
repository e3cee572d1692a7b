"""Gemma 1 (arXiv 2403.08295): Llama with norms that scale by 1 + weight, scaled embeddings and GELU.

Its first configs say "gelu" and mean the approximation with tanh.
"""

from jblock.families.base import ACTIVATIONS, Family, attention_bias
from jblock.families.gemma2 import embedding_scale

FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    head_dim=256,
    num_kv_heads=16,
    activation="gelu_pytorch_tanh",
    activations={**ACTIVATIONS, "gelu": "gelu_tanh"},
    tied=True,
    norm="rms_plus_one",
    attention_options=attention_bias,
    embedding=embedding_scale,
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh", "gelu"),
        "use_bidirectional_attention": (False,),
    },
)
