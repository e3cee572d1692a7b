"""Command R7B and Command A (arXiv 2504.00698): Command R in which three of four layers see a sliding
window, and the fourth sees everything, without rope."""

import dataclasses

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.cohere import PARALLEL, logit_scale
from jblock.families.rope import RopeSpec, rope
from jblock.families.windows import alternating


def _window(config: Config, layer: int) -> dict[str, int | None]:
    return alternating(config, layer, cfg.integer(config, "sliding_window_pattern", 4), 4096)


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec | None:
    if _window(config, layer)["sliding_window"] is None:
        return None
    return dataclasses.replace(rope(config, head_dim), interleaved=True)


FAMILY = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    model_types=("cohere2",),
    fields={"rms_norm_eps": "layer_norm_eps"},
    eps=1e-5,
    tied=True,
    norm="layer_no_bias",
    attention=PARALLEL,
    attention_options=lambda config, layer: {
        **_window(config, layer),
        **attention_bias(config, layer),
    },
    rope=_rope,
    ffn={"pre_norm": False},
    unembedding=logit_scale,
    fixed={"use_qk_norm": (False,)},
)
