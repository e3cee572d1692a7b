"""SmolLM 3 (Hugging Face, 2025): Llama in which every fourth layer has no rotary embedding."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias, mlp_bias
from jblock.families.rope import RopeSpec, rope
from jblock.families.windows import every_layer, layer_types


def _rotates(config: Config, layer: int) -> bool:
    """Whether a layer has a rotary embedding: `no_rope_layers` holds 1 for those that have one.

    Raises:
      ConfigError: it is no list of 0 and 1, one for each layer or more.
    """
    given = config.get("no_rope_layers")
    if given is None:
        return (layer + 1) % cfg.integer(config, "no_rope_layer_interval", 4) != 0
    layers = cfg.integer(config, "num_hidden_layers")
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise cfg.ConfigError(
            f"config.json: no_rope_layers is {given!r}; give a list of {layers} numbers: 1 for a layer "
            "with rope, 0 for one without"
        )
    return given[layer] == 1


def _options(config: Config, layer: int) -> dict[str, object]:
    types = layer_types(config)
    if types is not None:
        slides = types[layer] == "sliding_attention"
    else:
        slides = cfg.flag(config, "use_sliding_window", False) and not _rotates(config, layer)
    window = every_layer(config, layer) if slides else {"sliding_window": None}
    if types is not None and slides and window["sliding_window"] is None:
        raise cfg.ConfigError(
            f"config.json: layer_types[{layer}] is 'sliding_attention' and sliding_window is "
            f"{config.get('sliding_window')!r}: set it, or make the layer 'full_attention'"
        )
    return {**window, **attention_bias(config)}


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec | None:
    return rope(config, head_dim, theta=2e6) if _rotates(config, layer) else None


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    num_kv_heads=4,
    tied=True,
    attention_options=_options,
    rope=_rope,
    ffn_options=mlp_bias,
)
