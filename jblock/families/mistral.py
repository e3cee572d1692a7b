"""Mistral (arXiv 2310.06825): Llama with a sliding window on every layer, where the config has one.

A config without the field means 4096, as in the architecture's own defaults; null means none.
"""

from jblock.families import config as cfg
from jblock.families.base import Config, Family


def _window(config: Config, layer: int) -> int | None:
    del layer
    if config.get("sliding_window", 4096) is None:
        return None
    return cfg.integer(config, "sliding_window", 4096)


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    num_kv_heads=8,
    sliding_window=_window,
    fixed={"attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
)
