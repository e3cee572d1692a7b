"""Qwen 3, dense (arXiv 2505.09388): RMSNorm on q and k, heads of a size of their own, no biases."""

from jblock.families.base import Family, layer_types_window

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    qk_norm=True,
    head_dim=128,
    num_kv_heads=32,
    sliding_window=layer_types_window,
    fixed={"attention_bias": (False,), "mlp_bias": (False,), "use_mrope": (False,)},
)
