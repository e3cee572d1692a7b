"""Granite 3 (IBM, 2024): Llama whose embeddings, scores, residuals and logits each have a multiplier."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias, mlp_bias


def attention_options(config: Config, layer: int) -> dict[str, object]:
    """Biases, and the multipliers of scores and of the residual."""
    return {
        **attention_bias(config, layer),
        "scale": cfg.number(config, "attention_multiplier", 1.0),
        **residual_options(config),
    }


def residual_options(config: Config) -> dict[str, float]:
    """The multiplier of what a block adds to the residual."""
    return {"residual_scale": cfg.number(config, "residual_multiplier", 1.0)}


def embedding_options(config: Config) -> dict[str, float]:
    """The multiplier of embeddings."""
    return {"scale": cfg.number(config, "embedding_multiplier", 1.0)}


def unembedding_options(config: Config) -> dict[str, float]:
    """The divisor of logits, as a multiplier."""
    return {"scale": 1 / cfg.number(config, "logits_scaling", 1.0)}


FAMILY = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_types=("granite",),
    attention_options=attention_options,
    ffn_options=lambda config: {**mlp_bias(config), **residual_options(config)},
    embedding=embedding_options,
    unembedding=unembedding_options,
)
