"""Mixtral (arXiv 2401.04088): Mistral whose feed-forward is a mixture of experts in every layer."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, Mixture
from jblock.families.names import llama_but
from jblock.families.rope import rope
from jblock.families.windows import every_layer


def _mixture(config: Config, layer: int) -> Mixture:
    del layer
    return Mixture(
        num_experts=cfg.integer(config, "num_local_experts", 8, most=4096),
        top_k=cfg.integer(config, "num_experts_per_tok", 2),
        intermediate_size=cfg.integer(config, "intermediate_size"),
        normalize=True,
    )


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    num_kv_heads=8,
    eps=1e-5,
    names=llama_but(
        router={"router": "block_sparse_moe.gate"},
        expert={
            "gate": "block_sparse_moe.experts.{e}.w1",
            "up": "block_sparse_moe.experts.{e}.w3",
            "down": "block_sparse_moe.experts.{e}.w2",
        },
    ),
    attention_options=every_layer,
    rope=lambda config, layer, head_dim: rope(config, head_dim, theta=1e6),
    mixture=_mixture,
    fixed={"attention_bias": (False,), "layer_types": ()},
)
