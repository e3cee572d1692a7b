"""OLMo 3 (Ai2, 2025): OLMo 2 in which three of four layers see a sliding window; only the others stretch
their rope."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.olmo2 import ATTENTION, FFN
from jblock.families.rope import RopeSpec
from jblock.families.rope_by_layer import LayerRope, rope_of_layer
from jblock.families.windows import alternating

_THETA = 5e5


def _window(config: Config, layer: int) -> dict[str, int | None]:
    return alternating(config, layer, 4, 4096)


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec:
    if config.get("rope_parameters") is None and config.get("rope_theta", _THETA) != _THETA:
        raise cfg.ConfigError(
            f"config.json: rope_theta is {config['rope_theta']!r}, and releases of transformers disagree "
            "on whether sliding layers have it too: give rope_parameters with 'full_attention' and "
            "'sliding_attention'"
        )
    return rope_of_layer(
        config,
        head_dim,
        slides=_window(config, layer)["sliding_window"] is not None,
        full=LayerRope(theta=_THETA, scaled=True),
        sliding=LayerRope(theta=_THETA),
    )


FAMILY = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    model_types=("olmo3",),
    eps=1e-5,
    attention=ATTENTION,
    attention_options=lambda config, layer: {
        **_window(config, layer),
        **attention_bias(config, layer),
    },
    rope=_rope,
    ffn=FFN,
)
