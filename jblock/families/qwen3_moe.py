"""Qwen 3 MoE (arXiv 2505.09388): Qwen3 with a mixture of experts, none of them shared."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.qwen2_moe import qwen_mixture
from jblock.families.windows import every_layer


def _options(config: Config, layer: int) -> dict[str, object]:
    slides = cfg.flag(config, "use_sliding_window", False)
    window = every_layer(config, layer, 4096) if slides else {}
    return {**window, **attention_bias(config, layer)}


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    num_kv_heads=4,
    attention={"qk_norm": True},
    attention_options=_options,
    mixture=qwen_mixture,
    fixed={"layer_types": ()},
)
