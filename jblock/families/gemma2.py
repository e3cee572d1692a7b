"""Gemma 2 (arXiv 2408.00118): norms before and behind, soft-capped scores and logits, scaled
embeddings, and a sliding window on every other layer."""

import math

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.names import llama_but
from jblock.families.windows import alternating

NAMES = llama_but(ffn={"norm": "pre_feedforward_layernorm"})


def softcap(config: Config, field: str, default: float | None) -> float | None:
    """A bound on scores or logits; `default` when the field is absent, None when it is null."""
    return None if config.get(field, default) is None else cfg.number(config, field, default)


def embedding_scale(config: Config) -> dict[str, float]:
    """Embeddings are multiplied by the square root of their width."""
    return {"scale": math.sqrt(cfg.integer(config, "hidden_size"))}


def _options(config: Config, layer: int) -> dict[str, object]:
    return {
        **alternating(config, layer, 2, 4096),
        **attention_bias(config, layer),
        "scale": cfg.number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "softcap": softcap(config, "attn_logit_softcapping", 50.0),
    }


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    names=NAMES,
    fields={"hidden_act": "hidden_activation"},
    head_dim=256,
    num_kv_heads=4,
    activation="gelu_pytorch_tanh",
    tied=True,
    norm="rms_plus_one",
    attention={"post_norm": True},
    attention_options=_options,
    ffn={"post_norm": True},
    embedding=embedding_scale,
    unembedding=lambda config: {"softcap": softcap(config, "final_logit_softcapping", 30.0)},
    fixed={"use_bidirectional_attention": (False,)},
)
