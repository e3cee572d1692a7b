"""Gemma 3, text (arXiv 2503.19786): Gemma 2 without soft caps by default, with norms on q and k, and
with two rotary embeddings: one for the layers that slide, one for every sixth, which does not."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, attention_bias
from jblock.families.gemma2 import NAMES, embedding_scale, softcap
from jblock.families.rope import RopeSpec
from jblock.families.rope_by_layer import LayerRope, rope_of_layer
from jblock.families.windows import alternating


def _window(config: Config, layer: int) -> dict[str, int | None]:
    fields = ("sliding_window_pattern", "_sliding_window_pattern")
    field = next((f for f in fields if f in config), fields[0])
    return alternating(config, layer, cfg.integer(config, field, 6), 4096)


def _options(config: Config, layer: int) -> dict[str, object]:
    return {
        **_window(config, layer),
        **attention_bias(config, layer),
        "scale": cfg.number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "softcap": softcap(config, "attn_logit_softcapping", None),
    }


def _rope(config: Config, layer: int, head_dim: int) -> RopeSpec:
    return rope_of_layer(
        config,
        head_dim,
        slides=_window(config, layer)["sliding_window"] is not None,
        full=LayerRope(theta=1e6, scaled=True),
        sliding=LayerRope(theta=1e4, theta_field="rope_local_base_freq"),
    )


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    names=NAMES,
    fields={"hidden_act": "hidden_activation"},
    head_dim=256,
    num_kv_heads=4,
    activation="gelu_pytorch_tanh",
    tied=True,
    norm="rms_plus_one",
    attention={"post_norm": True, "qk_norm": True},
    attention_options=_options,
    rope=_rope,
    ffn={"post_norm": True},
    embedding=embedding_scale,
    unembedding=lambda config: {"softcap": softcap(config, "final_logit_softcapping", None)},
    fixed={"use_bidirectional_attention": (False,)},
)
