"""Llama 1 to 3.3 (arXiv 2302.13971, 2407.21783), and what others publish as LlamaForCausalLM, such as
SmolLM 2 and Falcon 3."""

from jblock.families.base import Family, attention_bias, mlp_bias

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    attention_options=attention_bias,
    ffn_options=mlp_bias,
)
