"""Llama 1 to 3.3 (arXiv 2302.13971, 2407.21783), and what others publish as LlamaForCausalLM."""

from jblock.families.base import Family

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    fixed={"attention_bias": (False,), "mlp_bias": (False,)},
)
