"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward only, and on all of q and k."""

from jblock.families.base import Family

FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    eps=1e-5,
    attention={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_joint": True},
    ffn={"pre_norm": False, "post_norm": True},
    fixed={"attention_bias": (False,), "clip_qkv": (), "layer_types": ()},
)
