"""Qwen 3, dense (arXiv 2505.09388): RMSNorm on q and k, heads of a size of their own, biases only where the
config asks for them."""

from jblock.families.base import Family, attention_bias
from jblock.families.windows import qwen

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    head_dim=128,
    num_kv_heads=32,
    attention={"qk_norm": True},
    attention_options=lambda config, layer: {
        **qwen(config, layer),
        **attention_bias(config, layer),
    },
    fixed={"use_mrope": (False,)},
)
