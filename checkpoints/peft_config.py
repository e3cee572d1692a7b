"""Strict reading of adapter_config.json: LoRA in the forms that can be served, the rest refused."""

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
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # how the base stores its matrices; the pair itself is the same
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Start values that also rewrite the base's weights: the adapter is no sum on the plain base.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What a program computes with holds no more.
_FLOAT32_MAX = 3.4e38
_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")  # as PEFT finds it
_REMEDY = {
    "use_dora": "merge it into the base and convert the result with 'hf'",
    "bias": "train with bias='none', or merge it into the base",
    "lora_bias": "train with lora_bias=False, or merge it into the base",
    "modules_to_save": "it holds whole modules: merge it into the base and convert with 'hf'",
    "trainable_token_indices": "merge it into the base and convert the result with 'hf'",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What an adapter_config.json says, as far as it matters here.

    Attributes:
      base: base_model_name_or_path, "" when not given.
      rank: r.
      alpha: lora_alpha.
      rslora: divide alpha by sqrt(rank) (arXiv 2312.03732) instead of by rank.
      ranks: pattern over module paths -> rank.
      alphas: pattern over module paths -> alpha.
      modules: endings of the modules that must be there; None: whatever the weights hold.
      may_adapt: endings of the modules that may be there; None: any.
      layers: layers that may be adapted; None: any.
    """

    base: str
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    modules: tuple[str, ...] | None
    may_adapt: tuple[str, ...] | None
    layers: tuple[int, ...] | None

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank of the adapter on `module`, and what its product is multiplied by."""
        rank = _match(self.ranks, module, self.rank)
        alpha = _match(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the config promises an adapter on `module`."""
        return self.modules is not None and _named(module, self.modules)

    def allows(self, module: str) -> bool:
        """Whether PEFT would make an adapter on `module`; weights for others it ignores."""
        if self.may_adapt is None or module in self.may_adapt:
            return True
        layer = _LAYER.match(module)
        right_layer = self.layers is None or (layer and int(layer[1]) in self.layers)
        return bool(right_layer and _named(module, self.may_adapt))


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Reads an adapter_config.json.

    Raises:
      CheckpointError: another method than LoRA, an option that cannot be served, or a malformed
        field; the message names it.
    """
    if config.get("peft_type") != "LORA":
        raise _refuse("peft_type", config.get("peft_type"), "only 'LORA' can be served")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refuse("task_type", config["task_type"], "only 'CAUSAL_LM' can be served")
    for field, value in config.items():
        # Off, in every spelling PEFT has for it.
        off = value is None or value is False or value == "none" or value in ([], {}, "")
        if not off and field not in _HARMLESS:
            raise _refuse(field, value, _REMEDY.get(field, "this option cannot be served"))
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_REWRITES_BASE):
        raise _refuse(
            "init_lora_weights",
            config["init_lora_weights"],
            "it changes the base's weights too: save the adapter again with "
            "path_initial_model_for_weight_conversion",
        )
    modules = config.get("target_modules")
    listed = isinstance(modules, list) and all(isinstance(m, str) for m in modules)
    if not (modules is None or isinstance(modules, str) or listed):
        raise _refuse("target_modules", modules, "give a list of names of modules")
    endings = tuple(modules) if listed and modules else None
    for field, kind in (("use_rslora", bool), ("base_model_name_or_path", str)):
        if config.get(field) is not None and not isinstance(config[field], kind):
            raise _refuse(field, config[field], f"give a {kind.__name__}")
    partial = any(config.get(f) for f in ("layers_pattern", "exclude_modules"))
    partial = partial or config.get("layers_to_transform") is not None
    return LoraSettings(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rslora=bool(config.get("use_rslora")),
        ranks=_patterns(config, "rank_pattern", _rank),
        alphas=_patterns(config, "alpha_pattern", _alpha),
        modules=None if partial else endings,
        may_adapt=endings,
        layers=_layers(config),
    )


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
