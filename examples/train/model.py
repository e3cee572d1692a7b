"""A small Llama in plain JAX, for training only.

Parameters are one flat dict from the Hugging Face tensor name to a float32 array in the Hugging
Face layout (a projection is `(out, in)`), so a checkpoint is this dict cast to bfloat16 and nothing
has to be renamed. Letters in shapes: B rows, T tokens, D hidden size, V vocabulary, H query heads,
K key/value heads, h head size, F feed-forward size, r LoRA rank.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
EMBEDDING = "model.embed_tokens.weight"
UNEMBEDDING = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Dimensions of one base.

    Attributes:
      vocab_size: entries of the tokenizer, special tokens included (V).
      hidden_size: width of the residual stream (D).
      num_layers: decoder layers.
      num_heads: query heads (H).
      num_kv_heads: key and value heads (K); H is a multiple of it.
      head_dim: size of one head (h).
      ffn_size: inner size of the gated feed-forward layer (F).
      tied: whether the unembedding is the embedding.
      max_positions: longest sequence the config file promises, in tokens.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in RMSNorm.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    tied: bool
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def module_name(layer: int, module: str) -> str:
    """Name of a layer's linear module as Hugging Face spells it, without `.weight`."""
    part = "self_attn" if module in ATTENTION else "mlp"
    return f"model.layers.{layer}.{part}.{module}"


def module_shape(config: Config, module: str) -> tuple[int, int]:
    """`(out, in)` of a layer's linear module."""
    d, f = config.hidden_size, config.ffn_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    return (shapes | {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)})[module]


def init_params(config: Config, key: jax.Array) -> Params:
    """Fresh float32 parameters: std 1/sqrt(in), what writes the residual scaled down by depth."""
    keys = iter(jax.random.split(key, 2 + config.num_layers * (len(ATTENTION) + len(FFN))))
    d = config.hidden_size
    params = {EMBEDDING: 0.05 * jax.random.normal(next(keys), (config.vocab_size, d))}
    unembedding_key = next(keys)
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            params[f"model.layers.{layer}.{norm}.weight"] = jnp.ones(d)
        for module in ATTENTION + FFN:
            shape = module_shape(config, module)
            scale = shape[1] ** -0.5
            if module in ("o_proj", "down_proj"):
                scale *= (2 * config.num_layers) ** -0.5
            name = module_name(layer, module) + ".weight"
            params[name] = scale * jax.random.normal(next(keys), shape)
    params[FINAL_NORM] = jnp.ones(d)
    if not config.tied:
        params[UNEMBEDDING] = (
            0.5 * d**-0.5 * jax.random.normal(unembedding_key, (config.vocab_size, d))
        )
    return params


def init_lora(config: Config, key: jax.Array, rank: int, modules: tuple[str, ...]) -> Params:
    """LoRA pairs of every layer: `lora_A` `(r, in)` random, `lora_B` `(out, r)` zero."""
    params = {}
    for layer in range(config.num_layers):
        for module in modules:
            key, sub = jax.random.split(key)
            out_size, in_size = module_shape(config, module)
            name = module_name(layer, module)
            params[f"{name}.lora_A.weight"] = in_size**-0.5 * jax.random.normal(
                sub, (rank, in_size)
            )
            params[f"{name}.lora_B.weight"] = jnp.zeros((out_size, rank))
    return params


def _linear(
    params: Mapping[str, jax.Array], name: str, x: jax.Array, lora_scale: float
) -> jax.Array:
    """`(B, T, in) -> (B, T, out)`, with the module's LoRA pair added where there is one."""
    y = x @ params[f"{name}.weight"].T
    if f"{name}.lora_A.weight" in params:
        y += lora_scale * (
            (x @ params[f"{name}.lora_A.weight"].T) @ params[f"{name}.lora_B.weight"].T
        )
    return y


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotates `(B, T, heads, h)` by position, halves paired as in Hugging Face's Llama."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)  # (h/2,)
    angles = jnp.arange(x.shape[1])[:, None] * frequencies  # (T, h/2)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attention(
    config: Config, params: Mapping[str, jax.Array], layer: int, x: jax.Array, lora_scale: float
) -> jax.Array:
    batch, length, _ = x.shape
    groups = config.num_heads // config.num_kv_heads

    def heads(module: str, count: int) -> jax.Array:
        y = _linear(params, module_name(layer, module), x, lora_scale)
        return y.reshape(batch, length, count, config.head_dim)

    q = _rope(heads("q_proj", config.num_heads), config.rope_theta)
    k = _rope(heads("k_proj", config.num_kv_heads), config.rope_theta)
    v = heads("v_proj", config.num_kv_heads)
    q = q.reshape(batch, length, config.num_kv_heads, groups, config.head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * config.head_dim**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, -1)
    return _linear(params, module_name(layer, "o_proj"), out, lora_scale)


def forward(
    config: Config, params: Mapping[str, jax.Array], tokens: jax.Array, lora_scale: float = 0.0
) -> jax.Array:
    """Hidden states after the final norm.

    Args:
      config: dimensions.
      params: base tensors, and LoRA pairs where an adapter is on.
      tokens: `(B, T)` int32; every row starts at position 0, padding sits on the right.
      lora_scale: alpha / rank of the adapter.

    Returns:
      `(B, T, D)` float32; multiply with `unembedding` for logits.
    """
    x = layers(config, params, params[EMBEDDING][tokens], 0, config.num_layers, lora_scale)
    return _rms_norm(x, params[FINAL_NORM], config.norm_eps)


def layers(
    config: Config,
    params: Mapping[str, jax.Array],
    x: jax.Array,
    first: int,
    last: int,
    lora_scale: float = 0.0,
) -> jax.Array:
    """Takes hidden states `(B, T, D)` through layers `first` to `last - 1`."""
    for layer in range(first, last):
        prefix = f"model.layers.{layer}"
        normed = _rms_norm(x, params[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x = x + _attention(config, params, layer, normed, lora_scale)
        normed = _rms_norm(x, params[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        gate = _linear(params, f"{prefix}.mlp.gate_proj", normed, lora_scale)
        up = _linear(params, f"{prefix}.mlp.up_proj", normed, lora_scale)
        x = x + _linear(params, f"{prefix}.mlp.down_proj", jax.nn.silu(gate) * up, lora_scale)
    return x


def head(config: Config, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Logits `(..., V)` of hidden states `(..., D)` behind the last layer."""
    return _rms_norm(x, params[FINAL_NORM], config.norm_eps) @ unembedding(config, params).T


def unembedding(config: Config, params: Mapping[str, jax.Array]) -> jax.Array:
    """The `(V, D)` matrix that turns hidden states into logits."""
    return params[EMBEDDING] if config.tied else params[UNEMBEDDING]


def count_params(params: Mapping[str, jax.Array]) -> int:
    """Number of scalars in a parameter dict."""
    return sum(int(value.size) for value in params.values())
