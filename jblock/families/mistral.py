"""Mistral (arXiv 2310.06825): Llama with a sliding window on every layer, where the config has one.

A config without the field means 4096, as in the architecture's own defaults; null means none.
"""

from jblock.families.base import Family
from jblock.families.windows import every_layer

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    num_kv_heads=8,
    attention_options=lambda config, layer: every_layer(config, layer, 4096),
    fixed={"attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
)
