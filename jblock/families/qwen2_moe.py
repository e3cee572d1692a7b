"""Qwen 1.5 and 2 MoE (arXiv 2407.10671): Qwen2 with a mixture of experts and one shared expert."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family, Mixture
from jblock.families.windows import qwen


def qwen_mixture(config: Config, layer: int, shared_size: int = 0) -> Mixture | None:
    """The experts of a layer; None where `mlp_only_layers` or `decoder_sparse_step` make it dense.

    Raises:
      ConfigError: a field that is missing or malformed.
    """
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise cfg.ConfigError(
            f"config.json: mlp_only_layers is {dense!r}; give a list of numbers of layers"
        )
    if layer in dense or (layer + 1) % cfg.integer(config, "decoder_sparse_step", 1):
        return None
    # transformers 5 writes num_local_experts for Qwen3.
    field = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return Mixture(
        num_experts=cfg.integer(config, field, most=4096),
        top_k=cfg.integer(config, "num_experts_per_tok"),
        intermediate_size=cfg.integer(config, "moe_intermediate_size"),
        normalize=cfg.flag(config, "norm_topk_prob", False),
        shared_size=shared_size,
    )


def _mixture(config: Config, layer: int) -> Mixture | None:
    return qwen_mixture(config, layer, cfg.integer(config, "shared_expert_intermediate_size"))


def _options(config: Config, layer: int) -> dict[str, object]:
    if cfg.flag(config, "use_sliding_window", False) and config.get("layer_types") is None:
        raise cfg.ConfigError(
            "config.json: use_sliding_window is True, and releases of transformers disagree on which "
            "layers of this architecture slide: add layer_types"
        )
    return {**qwen(config, layer), "qkv_bias": cfg.flag(config, "qkv_bias", True)}


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    num_kv_heads=16,
    attention_options=_options,
    mixture=_mixture,
)
