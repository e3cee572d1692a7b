"""Ministral 3 (Mistral AI, 2025): Mistral with yarn, and queries that grow with the logarithm of their
position."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.fields import changed
from jblock.families.rope import RopeSpec, rope
from jblock.families.windows import every_layer

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _section(config: Config) -> tuple[str, Config]:
    """The name and content of the section with the rope fields, the newest spelling first."""
    for field in ("rope_parameters", "rope_scaling"):
        section = config.get(field)
        if isinstance(section, dict):
            return field, section
    return "rope_parameters", _ROPE


def _options(config: Config, layer: int) -> dict[str, object]:
    field, section = _section(config)
    options: dict[str, object] = dict(every_layer(config, layer))
    if section.get("llama_4_scaling_beta") is None:
        return options
    if section.get("original_max_position_embeddings") is None:
        raise cfg.ConfigError(
            f"config.json: {field} has llama_4_scaling_beta and no original_max_position_embeddings: "
            "add it"
        )
    return options | {
        "log_scale_beta": cfg.number(section, "llama_4_scaling_beta"),
        "log_scale_positions": cfg.integer(section, "original_max_position_embeddings"),
    }


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec:
    del layer
    field, section = _section(config)
    return rope(changed(config, **{field: section}), head_dim)


FAMILY = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    model_types=("ministral3",),
    head_dim=128,
    num_kv_heads=8,
    eps=1e-5,
    attention_options=_options,
    rope=_rope,
)
