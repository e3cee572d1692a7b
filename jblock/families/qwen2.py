"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k and v."""

from jblock.families.base import Family, layer_types_window

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    qkv_bias=True,
    num_kv_heads=32,
    sliding_window=layer_types_window,
    fixed={"mlp_bias": (False,), "use_mrope": (False,)},
)
