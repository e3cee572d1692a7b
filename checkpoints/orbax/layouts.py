"""Where JAX trainers keep what transformers calls by its names.

Three layouts are read:

  flax     Transformers' own names as Flax writes them: model.layers.0.self_attn.q_proj.kernel [in, out],
           model.embed_tokens.embedding, norms as .scale or .weight. `export --format orbax` writes it.
  tunix    Tunix (github.com/google/tunix, tunix/models/{llama3,qwen2,qwen3}/params.py): NNX modules with
           layers.0.attn.q_proj.w [in, heads, head_dim], embedder.input_embedding, final_norm.w.
  maxtext  MaxText (github.com/AI-Hypercomputer/maxtext, src/maxtext/checkpoint_conversion/utils/
           param_mapping.py), of Llama, Mistral, Qwen 2 and 3: decoder.layers_0.self_attention.query.kernel,
           or with all layers stacked along the second axis decoder.layers.self_attention.query.kernel. Of
           Llama the query holds 1 / sqrt(head_dim), and queries and keys rotate neighboring pairs.

Kernels lie [in, out] everywhere, with out (of `out` and `o_proj`: in) as [heads, head_dim] or flat.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


Change = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one tensor of transformers' may lie.

    Attributes:
      names: names it may have; the first that is there is taken.
      layer: index along axis 1 where all layers lie in one array; None where the tensor is alone.
      change: what makes it the tensor of transformers', given the shape of that.
    """

    names: tuple[str, ...]
    layer: int | None = None
    change: Change


def _same(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return value.reshape(shape)


def _kernel(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[in, out] -> [out, in], heads and their dimensions together."""
    return np.ascontiguousarray(value.reshape(shape[::-1]).T)


def _rows(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The first rows: trainers pad vocabularies to a multiple of what their devices like."""
    return np.ascontiguousarray(value[: shape[0]])


def _head(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(value[:, : shape[0]].T)


Layout = Callable[[str, Mapping[str, Any]], list[Place]]


def flax(name: str, config: Mapping[str, Any]) -> list[Place]:
    """Places of a tensor under transformers' own names."""
    del config
    module, _, kind = name.rpartition(".")
    bare = module.removeprefix("model.")
    whole = (module, bare)
    modules = dict.fromkeys((*whole, *(re.sub(r"\blayers\.", "layers_", m) for m in whole)))
    if kind == "bias":
        return [Place(names=tuple(f"{m}.bias" for m in modules), change=_same)]
    if module.endswith("embed_tokens"):
        leaves = ("embedding", "weight")
        return [Place(names=tuple(f"{m}.{leaf}" for m in modules for leaf in leaves), change=_rows)]
    if module.endswith("norm"):
        leaves = ("scale", "weight")
        return [Place(names=tuple(f"{m}.{leaf}" for m in modules for leaf in leaves), change=_same)]
    return [Place(names=tuple(f"{m}.kernel" for m in modules), change=_kernel)]


_TUNIX: dict[str, tuple[str, Change]] = {
    "self_attn.q_proj.weight": ("attn.q_proj.w", _kernel),
    "self_attn.k_proj.weight": ("attn.k_proj.w", _kernel),
    "self_attn.v_proj.weight": ("attn.v_proj.w", _kernel),
    "self_attn.o_proj.weight": ("attn.o_proj.w", _kernel),
    "self_attn.q_proj.bias": ("attn.q_bias", _same),
    "self_attn.k_proj.bias": ("attn.k_bias", _same),
    "self_attn.v_proj.bias": ("attn.v_bias", _same),
    "self_attn.q_norm.weight": ("attn.q_norm.w", _same),
    "self_attn.k_norm.weight": ("attn.k_norm.w", _same),
    "mlp.gate_proj.weight": ("mlp.gate_proj.kernel", _kernel),
    "mlp.up_proj.weight": ("mlp.up_proj.kernel", _kernel),
    "mlp.down_proj.weight": ("mlp.down_proj.kernel", _kernel),
    "input_layernorm.weight": ("input_layernorm.w", _same),
    "post_attention_layernorm.weight": ("post_attention_layernorm.w", _same),
}


def tunix(name: str, config: Mapping[str, Any]) -> list[Place]:
    """Places of a tensor in Tunix' Llama 3, Qwen 2 and Qwen 3."""
    del config
    outside: dict[str, tuple[str, Change]] = {
        "model.embed_tokens.weight": ("embedder.input_embedding", _rows),
        "model.norm.weight": ("final_norm.w", _same),
        "lm_head.weight": ("lm_head.w", _head),
    }
    if name in outside:
        place, change = outside[name]
        return [Place(names=(place,), change=change)]
    match = _LAYER.fullmatch(name)
    found = match and _TUNIX.get(f"{match[2]}.{match[3]}")
    if not match or not found:
        return []
    return [Place(names=(f"layers.{match[1]}.{found[0]}",), change=found[1])]


_MAXTEXT = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.o_proj": "self_attention.out",
    "self_attn.q_norm": "self_attention.query_norm",
    "self_attn.k_norm": "self_attention.key_norm",
    "mlp.gate_proj": "mlp.wi_0",
    "mlp.up_proj": "mlp.wi_1",
    "mlp.down_proj": "mlp.wo",
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}
_OF_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")


def maxtext(name: str, config: Mapping[str, Any]) -> list[Place]:
    """Places of a tensor in MaxText's Llama, Mistral, Qwen 2 and Qwen 3."""
    outside: dict[str, tuple[str, Change]] = {
        "model.embed_tokens.weight": ("token_embedder.embedding", _rows),
        "model.norm.weight": ("decoder.decoder_norm.scale", _same),
        "lm_head.weight": ("decoder.logits_dense.kernel", _head),
    }
    if name in outside:
        place, change = outside[name]
        return [Place(names=(place,), change=change)]
    match = _LAYER.fullmatch(name)
    module = match and _MAXTEXT.get(match[2])
    if not match or not module:
        return []
    made: Change = _same
    leaf = "bias" if match[3] == "bias" else "scale" if "norm" in module else "kernel"
    if leaf == "kernel":
        llama = (config.get("architectures") or [""])[0] in _OF_LLAMA
        made = _of_llama(match[2], config) if llama else _kernel
    return [
        Place(names=(f"decoder.layers_{match[1]}.{module}.{leaf}",), change=made),
        Place(names=(f"decoder.layers.{module}.{leaf}",), layer=int(match[1]), change=made),
    ]


def _of_llama(module: str, config: Mapping[str, Any]) -> Change:
    if module not in ("self_attn.q_proj", "self_attn.k_proj"):
        return _kernel
    query = module == "self_attn.q_proj"
    heads = config["num_attention_heads"] if query else config.get("num_key_value_heads")

    def change(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        apart = value.reshape(shape[1], heads or config["num_attention_heads"], -1)
        if query:
            scale = np.float32(np.sqrt(apart.shape[-1]))
            apart = (apart.astype(np.float32) * scale).astype(value.dtype)
        halves = np.concatenate((apart[..., ::2], apart[..., 1::2]), axis=-1)
        return _kernel(halves, shape)

    return change


LAYOUTS: dict[str, Layout] = {"flax": flax, "tunix": tunix, "maxtext": maxtext}
