"""StarCoder 2 (arXiv 2402.19173): LayerNorm, biases, a feed-forward without gate, rope, and a sliding
window on every layer where the config has one."""

from jblock.families import config as cfg
from jblock.families.base import Config, Family
from jblock.families.names import llama_but
from jblock.families.windows import every_layer


def _options(config: Config, layer: int) -> dict[str, object]:
    biased = cfg.flag(config, "use_bias", True)
    return {**every_layer(config, layer), "qkv_bias": biased, "o_bias": biased}


FAMILY = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    names=llama_but(ffn={"up": "mlp.c_fc", "down": "mlp.c_proj"}),
    fields={"rms_norm_eps": "norm_epsilon"},
    num_kv_heads=2,
    eps=1e-5,
    activation="gelu_pytorch_tanh",
    tied=True,
    norm="layer",
    attention_options=_options,
    ffn={"gated": False},
    ffn_options=lambda config: {"bias": cfg.flag(config, "use_bias", True)},
    fixed={"layer_types": ()},
)
