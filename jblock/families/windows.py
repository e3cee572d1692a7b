"""Which layers see a sliding window, in the ways configs say it."""

from jblock.families import config as cfg
from jblock.families.base import Config

_KINDS = ("full_attention", "sliding_attention")


def layer_types(config: Config) -> list[str] | None:
    """The field `layer_types`, which transformers 5 writes; None where it is absent.

    Raises:
      ConfigError: not one known type for each layer.
    """
    given = config.get("layer_types")
    layers = cfg.integer(config, "num_hidden_layers")
    if given is not None and (
        not isinstance(given, list) or len(given) != layers or any(t not in _KINDS for t in given)
    ):
        raise cfg.ConfigError(
            f"config.json: layer_types is {given!r}; give one of {_KINDS} for each of the {layers} "
            "layers, or remove it"
        )
    return given


def every_layer(config: Config, layer: int, default: int | None = None) -> dict[str, int | None]:
    """One window for all layers: `sliding_window`, null for none, `default` when absent."""
    del layer
    if config.get("sliding_window", default) is None:
        return {"sliding_window": None}
    return {"sliding_window": cfg.integer(config, "sliding_window", default)}


def alternating(config: Config, layer: int, period: int, default: int) -> dict[str, int | None]:
    """Gemma's rule: all layers but each `period`-th slide, where `layer_types` says nothing else."""
    types = layer_types(config)
    slides = (layer + 1) % period > 0 if types is None else types[layer] == "sliding_attention"
    return every_layer(config, layer, default) if slides else {"sliding_window": None}


def qwen(config: Config, layer: int) -> dict[str, int | None]:
    """Qwen's rule: layers from max_window_layers on slide, if use_sliding_window says so.

    `layer_types` must say the same or is followed where the older fields leave it open.

    Raises:
      ConfigError: layer types that are not known or contradict the other fields.
    """
    types = layer_types(config)
    window = None
    if cfg.flag(config, "use_sliding_window", False) and config.get("sliding_window") is not None:
        window = cfg.integer(config, "sliding_window")
    if types is not None:
        slides = types[layer] == "sliding_attention"
    else:
        slides = window is not None and layer >= cfg.integer(
            config, "max_window_layers", 28, least=0
        )
    if slides and window is None:
        raise cfg.ConfigError(
            f"config.json: layer_types[{layer}] is 'sliding_attention' but use_sliding_window is "
            f"{config.get('use_sliding_window')!r} and sliding_window "
            f"{config.get('sliding_window')!r}: set both, or make the layer 'full_attention'"
        )
    return {"sliding_window": window if slides else None}
