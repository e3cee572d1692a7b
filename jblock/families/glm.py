"""GLM-4 9B (arXiv 2406.12793): Llama with biases on q, k and v, gate and up in one projection, and rope
over half of a head, each even dimension paired with the odd one behind it."""

import dataclasses

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.rope import RopeSpec, rope


def interleaved_half(config: Config, layer: int, head_dim: int) -> RopeSpec:
    """GLM's rotary embedding."""
    del layer
    return dataclasses.replace(rope(config, head_dim, partial=0.5), interleaved=True)


def biases(config: Config, layer: int) -> dict[str, bool]:
    """GLM's rule: `attention_bias`, on by default, is for q, k and v."""
    del layer
    return {"qkv_bias": cfg.flag(config, "attention_bias", True)}


FAMILY = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    head_dim=128,
    num_kv_heads=2,
    eps=1.5625e-07,
    attention_options=biases,
    rope=interleaved_half,
    ffn={"joined": True},
)
