"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward only, and on all of q and k."""

from jblock.families.base import Family, attention_bias

ATTENTION = {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_joint": True}
FFN = {"pre_norm": False, "post_norm": True}

FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    eps=1e-5,
    attention=ATTENTION,
    attention_options=attention_bias,
    ffn=FFN,
    fixed={"clip_qkv": (), "layer_types": ()},
)
