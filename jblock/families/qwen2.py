"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k and v."""

from jblock.families.base import Family
from jblock.families.windows import qwen

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    num_kv_heads=32,
    attention={"qkv_bias": True},
    attention_options=qwen,
    fixed={"mlp_bias": (False,), "use_mrope": (False,)},
)
