"""Ministral (Mistral AI, 2024) as transformers 5 lays it out: Mistral whose layers say in `layer_types`
which of them slide."""

from jblock.families.base import Config, Family
from jblock.families.windows import every_layer, layer_types


def _options(config: Config, layer: int) -> dict[str, int | None]:
    types = layer_types(config)
    slides = types is None or types[layer] == "sliding_attention"
    return every_layer(config, layer, 4096) if slides else {"sliding_window": None}


FAMILY = Family(
    name="ministral",
    architectures=("MinistralForCausalLM",),
    model_types=("ministral",),
    num_kv_heads=8,
    attention_options=_options,
)
