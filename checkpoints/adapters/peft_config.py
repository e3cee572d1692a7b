"""Strict reading of adapter_config.json: the methods and options that can be served, the rest refused."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from checkpoints.errors import CheckpointError

# Fields that only say how the adapter was made, or are read below.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",  # how the base stores its matrices; the tensors themselves are the same
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}
_LORA = _HARMLESS | {
    "alora_invocation_tokens",
    "alpha_pattern",
    "bias",
    "corda_config",
    "eva_config",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "runtime_config",
    "use_dora",
    "use_rslora",
}
_PROMPT = _HARMLESS | {
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "prefix_projection",  # what is saved is what came out of it
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
# peft_type -> fields that may be set.
_METHODS = {
    "LORA": _LORA,
    "IA3": _HARMLESS | {"feedforward_modules", "init_ia3_weights", "modules_to_save"},
    "LN_TUNING": _HARMLESS | {"modules_to_save"},
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
}
# Start values that also rewrite the base's weights: the adapter is no sum on the plain base.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What a program computes with holds no more.
_FLOAT32_MAX = 3.4e38
# The first number of a path, as PEFT finds a layer's since 0.21: one further on may be an expert's.
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_REMEDY = {
    "trainable_token_indices": "merge it into the base and convert the result with 'hf'",
    "ensure_weight_tying": "train without it, or merge it into the base",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What an adapter_config.json says of LoRA.

    Attributes:
      rank: r.
      alpha: lora_alpha.
      rslora: divide alpha by sqrt(rank) (arXiv 2312.03732) instead of by rank.
      ranks: pattern over module paths -> rank.
      alphas: pattern over module paths -> alpha.
      dora: use_dora.
      b_bias: lora_bias.
      bias: "none", "all" or "lora_only": which biases of the base come with it.
      invocation: alora_invocation_tokens; () without.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dora: bool
    b_bias: bool
    bias: str
    invocation: tuple[int, ...] = ()

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank of the adapter on `module`, and what its product is multiplied by."""
        rank = _match(self.ranks, module, self.rank)
        alpha = _match(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an adapter_config.json says, as far as it matters here.

    Attributes:
      method: peft_type.
      modules: endings of the modules that must be there; None: whatever the weights hold.
      may_adapt: endings of the modules that may be there; None: any.
      layers: layers that may be adapted; None: any.
      layer_lists: layers_pattern: names of the lists that layers are numbered in; () for any.
      saved: modules_to_save: endings of modules that come whole.
      feedforward: endings of the modules whose inputs (IA)3 scales.
      virtual_tokens: num_virtual_tokens; 0 without.
      lora: what concerns LoRA.
    """

    method: str
    modules: tuple[str, ...] | None
    may_adapt: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    layer_lists: tuple[str, ...]
    saved: tuple[str, ...]
    feedforward: tuple[str, ...] = ()
    virtual_tokens: int = 0
    lora: LoraSettings | None = None

    def targets(self, module: str) -> bool:
        """Whether the config promises an adapter on `module`."""
        return self.modules is not None and _named(module, self.modules)

    def allows(self, module: str) -> bool:
        """Whether PEFT would make an adapter on `module`; weights for others it ignores."""
        if self.may_adapt is None or module in self.may_adapt:
            return True
        right_layer = self.layers is None or self._layer(module) in self.layers
        return right_layer and _named(module, self.may_adapt)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that `module` is in."""
        patterns = [re.compile(rf"(?:^|.*?\.){re.escape(n)}\.(\d+)\.") for n in self.layer_lists]
        found = (pattern.match(module) for pattern in patterns or [_LAYER])
        return next((int(layer[1]) for layer in found if layer), None)

    def saves(self, module: str) -> bool:
        """Whether `module`, or one that it is in, comes whole."""
        parts = module.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(path.endswith(ending) for path in paths for ending in self.saved)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Reads an adapter_config.json.

    Raises:
      CheckpointError: a method or an option that cannot be served, or a malformed field; the message
        names it.
    """
    method = config.get("peft_type")
    if method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise _refuse(
            "peft_type",
            method,
            f"only {known} can be served: merge it into the base and convert the result with 'hf'",
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refuse("task_type", config["task_type"], "only 'CAUSAL_LM' can be served")
    for field, value in config.items():
        # Off, in every spelling PEFT has for it.
        off = value is None or value is False or value == "none" or value in ([], {}, "")
        if not off and field not in _METHODS[method]:
            raise _refuse(field, value, _REMEDY.get(field, "this option cannot be served"))
    endings = _endings(config, "target_modules")
    partial = any(config.get(f) for f in ("layers_pattern", "exclude_modules"))
    partial = partial or config.get("layers_to_transform") is not None
    virtual = 0
    if _METHODS[method] is _PROMPT:
        virtual = _rank("num_virtual_tokens", config.get("num_virtual_tokens"))
        if config.get("num_transformer_submodules") not in (None, 1):
            raise _refuse(
                "num_transformer_submodules",
                config["num_transformer_submodules"],
                "only decoders can be served, which have 1",
            )
    return Settings(
        method=method,
        modules=None if partial else endings,
        may_adapt=endings,
        layers=_layers(config),
        layer_lists=_layer_lists(config),
        saved=_endings(config, "modules_to_save") or (),
        feedforward=_endings(config, "feedforward_modules") or (),
        virtual_tokens=virtual,
        lora=_lora_settings(config) if method == "LORA" else None,
    )


def _lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_REWRITES_BASE):
        raise _refuse(
            "init_lora_weights",
            config["init_lora_weights"],
            "it changes the base's weights too: save the adapter again with "
            "path_initial_model_for_weight_conversion",
        )
    for field in ("use_rslora", "use_dora", "lora_bias"):
        if config.get(field) is not None:
            _typed(config, field, bool)
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise _refuse("bias", bias, "give 'none', 'all' or 'lora_only'")
    if config.get("use_dora") and config.get("lora_bias"):
        raise _refuse("lora_bias", True, "with use_dora no bias can be served: train without one")
    return LoraSettings(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rslora=bool(config.get("use_rslora")),
        ranks=_patterns(config, "rank_pattern", _rank),
        alphas=_patterns(config, "alpha_pattern", _alpha),
        dora=bool(config.get("use_dora")),
        b_bias=bool(config.get("lora_bias")),
        bias=bias,
        invocation=_invocation(config, bias),
    )


def _invocation(config: Mapping[str, Any], bias: str) -> tuple[int, ...]:
    """Of an activated LoRA, the tokens that invoke it. What else it changes would act before them too."""
    field = "alora_invocation_tokens"
    tokens = config.get(field)
    if not tokens:
        return ()
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
        raise _refuse(field, tokens, "give a list of token ids")
    others = {
        "use_dora": config.get("use_dora"),
        "bias": bias != "none",
        "modules_to_save": config.get("modules_to_save"),
    }
    for other in (name for name, there in others.items() if there):
        raise _refuse(
            other, config[other], f"with {field} it cannot be served: train without one of them"
        )
    return tuple(tokens)


def _endings(config: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    """A list of names of modules; None where it is not given, or a pattern over them."""
    modules = config.get(field)
    listed = isinstance(modules, list) and all(isinstance(m, str) for m in modules)
    if modules is not None and not isinstance(modules, str) and not listed:
        raise _refuse(field, modules, "give a list of names of modules")
    if isinstance(modules, str) and field != "target_modules":
        raise _refuse(field, modules, "patterns cannot be served here: list the modules")
    return tuple(modules) if listed and modules else None


def _typed(config: Mapping[str, Any], field: str, kind: type) -> None:
    if not isinstance(config[field], kind):
        raise _refuse(field, config[field], f"give a {kind.__name__}")


def _named(module: str, endings: tuple[str, ...]) -> bool:
    return any(module == e or module.endswith(f".{e}") for e in endings)


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    given = config.get("layers_to_transform")
    layers = [given] if isinstance(given, int) else given or None
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise _refuse("layers_to_transform", given, "give a list of numbers of layers")
    return tuple(layers)


def _layer_lists(config: Mapping[str, Any]) -> tuple[str, ...]:
    given = config.get("layers_pattern") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(
        isinstance(n, str) and re.fullmatch(r"[\w.]+", n) for n in names
    ):
        raise _refuse("layers_pattern", given, "give the name of the list of layers, as 'layers'")
    return tuple(names)


def _refuse(field: str, value: Any, remedy: str) -> CheckpointError:
    return CheckpointError(f"adapter_config.json: {field} is {value!r}: {remedy}")


def _rank(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise _refuse(field, value, "give an integer of 1 or more")
    return value


def _alpha(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(field, value, "give a number")
    if not abs(value) <= _FLOAT32_MAX:
        raise _refuse(field, value, "give a number that float32 holds")
    return float(value)


def _patterns(config: Mapping[str, Any], field: str, check: Any) -> dict[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _refuse(field, patterns, "give an object of pattern and value")
    for pattern in patterns:
        # Nested or many repetitions can match for hours; names of modules never need them.
        if any(c in pattern for c in "(){}") or sum(map(pattern.count, "*+?")) > 4:
            raise _refuse(
                field,
                pattern,
                "patterns with groups or over 4 repetitions cannot be served: list the modules",
            )
        try:
            re.compile(pattern)
        except re.error as e:
            raise _refuse(field, pattern, f"no valid pattern ({e})") from e
    return {p: check(f"{field}[{p!r}]", v) for p, v in patterns.items()}


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # As PEFT does: the first pattern that matches the path from any dot on.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
