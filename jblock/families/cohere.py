"""Command R (Cohere, 2024): LayerNorm without bias, one a layer, whose output attention and feed-forward
both read; rope that pairs neighbors; scaled logits."""

import dataclasses

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.rope import RopeSpec, rope

PARALLEL = {"parallel": True, "shared_norm": True}


def logit_scale(config: Config) -> dict[str, float]:
    """The multiplier of logits."""
    return {"scale": cfg.number(config, "logit_scale", 0.0625)}


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec:
    del layer
    return dataclasses.replace(rope(config, head_dim, theta=5e5), interleaved=True)


FAMILY = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    model_types=("cohere",),
    fields={"rms_norm_eps": "layer_norm_eps"},
    eps=1e-5,
    tied=True,
    norm="layer_no_bias",
    attention=PARALLEL,
    attention_options=attention_bias,
    rope=_rope,
    ffn={"pre_norm": False},
    unembedding=logit_scale,
    # Command R+ has norms of q and k with a weight for each head.
    fixed={"use_qk_norm": (False,)},
)
