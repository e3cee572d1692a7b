"""Where Llama keeps its tensors: module of a component -> module of the checkpoint.

Later families kept most of these names; each overrides what differs. `{i}` is the layer, `{e}` the
expert. A component's tensor `q.weight` lies in module `q`, its tensor `weight` in module "".
"""

import types
from collections.abc import Mapping

Names = Mapping[str, Mapping[str, str]]

_ATTENTION = {
    "norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{p: f"self_attn.{p}_proj" for p in ("q", "k", "v", "o", "qkv")},
    **{p: f"self_attn.{p}" for p in ("q_norm", "k_norm")},
}
_FFN = {
    "norm": "post_attention_layernorm",
    "post_norm": "post_feedforward_layernorm",
    **{p: f"mlp.{p}_proj" for p in ("gate", "up", "down", "gate_up")},
}
_ROUTER = {
    "norm": "post_attention_layernorm",
    "router": "mlp.gate",
    "shared_gate": "mlp.shared_expert_gate",
}
_EXPERT = {p: f"mlp.experts.{{e}}.{p}_proj" for p in ("gate", "up", "down")}
_SHARED = {p: f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")}


def in_layers(prefix: str, **tables: Mapping[str, str]) -> Names:
    """Tables of a layer's components, their modules put behind `prefix`."""
    return {
        kind: types.MappingProxyType({part: prefix + module for part, module in table.items()})
        for kind, table in tables.items()
    }


LLAMA: Names = types.MappingProxyType(
    {
        "embedding": {"": "model.embed_tokens"},
        **in_layers(
            "model.layers.{i}.",
            attention=_ATTENTION,
            ffn=_FFN,
            router=_ROUTER,
            expert=_EXPERT,
            shared_expert=_SHARED,
        ),
        "norm": {"": "model.norm"},
        "unembedding": {"": "lm_head"},
    }
)


def llama_but(**layer_tables: Mapping[str, str]) -> Names:
    """LLAMA, with other modules for some parts of a layer's components."""
    other = in_layers("model.layers.{i}.", **layer_tables)
    return types.MappingProxyType(
        {**LLAMA, **{kind: {**LLAMA[kind], **table} for kind, table in other.items()}}
    )
