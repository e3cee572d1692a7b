"""The rotary embedding a config asks for, in every spelling and variant that is served."""

import math
from collections.abc import Mapping
from typing import Any

from jblock.blocks.rope_spec import RopeSpec
from jblock.families.config import ConfigError, flag, integer, number

# Fields of each variant beside its type and theta.
_REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
}
_OPTIONAL = {
    "yarn": {
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {"original_max_position_embeddings", "attention_factor", "factor"},
}


def rope(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_field: str = "rope_theta",
    partial: float | None = None,
    partial_field: str = "partial_rotary_factor",
) -> RopeSpec:
    """The rotary embedding of a config.

    Args:
      config: a config.json, or the part of one that holds the rope fields.
      head_dim: width of a head.
      theta: what a config without the field means.
      theta_field: where the config has it, outside of the sections for rope.
      partial: rotated share of a head in a config without the field; None: the architecture always
        rotates all of it.
      partial_field: where the config has it, likewise.

    Raises:
      ConfigError: a rope type, field or value that is not known, or two spellings that disagree.
    """
    scaling = _section(config, "rope_scaling")
    modern = _section(config, "rope_parameters")
    if scaling and modern and _kind(scaling) != _kind(modern):
        raise ConfigError(
            f"config.json: rope_scaling asks for {_kind(scaling)!r} and rope_parameters for "
            f"{_kind(modern)!r}; remove the wrong one"
        )
    theta = _either(config, modern, theta_field, "rope_theta", theta)
    share = _either(config, modern, partial_field, "partial_rotary_factor", partial or 1.0)
    if share > 1 or (partial is None and share != 1):
        raise ConfigError(
            f"config.json: {partial_field} is {share!r}; "
            + (
                "rope over part of a head is not known here"
                if partial is None
                else "give a number up to 1"
            )
        )
    dim = int(head_dim * share)
    params = {**scaling, **modern}
    kind = _kind(params)
    named = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    extra = {k: v for k, v in params.items() if k not in named}
    if kind not in _REQUIRED or not _REQUIRED[kind] <= extra.keys() <= _REQUIRED[
        kind
    ] | _OPTIONAL.get(kind, set()):
        raise ConfigError(
            f"config.json: rope of type {kind!r} with fields {sorted(extra)} is not known; known: "
            + ", ".join(f"{k!r} with {sorted(v) or 'none'}" for k, v in _REQUIRED.items())
        )
    common: dict[str, Any] = {"theta": theta, "dim": 0 if dim == head_dim else dim}
    if kind == "linear":
        return RopeSpec(kind=kind, factor=number(extra, "factor"), **common)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            factor=number(extra, "factor"),
            low_freq_factor=number(extra, "low_freq_factor"),
            high_freq_factor=number(extra, "high_freq_factor"),
            original_max_position=integer(extra, "original_max_position_embeddings"),
            **common,
        )
    if kind == "yarn":
        return _yarn(config, extra, common)
    if kind == "longrope":
        return _longrope(config, extra, common, dim)
    # "dynamic" stretches sequences past max_position_embeddings only, where serving ends.
    return RopeSpec(**common)


def original_positions(config: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """Context length in tokens a model was first trained on; where it is not given, what it has now."""
    for section in (config, params):
        if section.get("original_max_position_embeddings") is not None:
            return integer(section, "original_max_position_embeddings")
    return integer(config, "max_position_embeddings")


def _yarn(
    config: Mapping[str, Any], extra: Mapping[str, Any], common: Mapping[str, Any]
) -> RopeSpec:
    factor = number(extra, "factor")
    if extra.get("attention_factor") is not None:
        attention = number(extra, "attention_factor")
    elif extra.get("mscale") and extra.get("mscale_all_dim"):
        one, other = number(extra, "mscale"), number(extra, "mscale_all_dim")
        attention = _mscale(factor, one) / _mscale(factor, other)
    else:
        attention = _mscale(factor, 1.0)
    return RopeSpec(
        kind="yarn",
        factor=factor,
        original_max_position=original_positions(config, extra),
        beta_fast=number(extra, "beta_fast", 32.0),
        beta_slow=number(extra, "beta_slow", 1.0),
        truncate=flag(extra, "truncate", True),
        attention_factor=attention,
        **common,
    )


def _mscale(factor: float, scale: float) -> float:
    # arXiv 2309.00071, equation 22.
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(
    config: Mapping[str, Any], extra: Mapping[str, Any], common: Mapping[str, Any], dim: int
) -> RopeSpec:
    first = original_positions(config, extra)
    factor = number(extra, "factor", integer(config, "max_position_embeddings") / first)
    if extra.get("attention_factor") is not None:
        attention = number(extra, "attention_factor")
    else:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(first))
    for field in ("short_factor", "long_factor"):
        value = extra[field]
        if not isinstance(value, list) or len(value) != dim // 2:
            raise ConfigError(
                f"config.json: {field} is {value!r}; give a list of {dim // 2} numbers, one for each "
                f"pair of the {dim} rotated dimensions"
            )
    factors = [number({"short_factor": f}, "short_factor") for f in extra["short_factor"]]
    return RopeSpec(kind="longrope", factors=tuple(factors), attention_factor=attention, **common)


def _either(
    config: Mapping[str, Any],
    modern: Mapping[str, Any],
    field: str,
    modern_field: str,
    default: float,
) -> float:
    """A number that stands in the config or in its newer section, if at all.

    Raises:
      ConfigError: it stands in both, with two values.
    """
    outside, inside = config.get(field), modern.get(modern_field)
    if outside is not None and inside is not None and outside != inside:
        raise ConfigError(
            f"config.json: {field} is {outside!r} and rope_parameters.{modern_field} {inside!r}; "
            "remove the wrong one"
        )
    return number(modern, modern_field, number(config, field, default))


def _section(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ConfigError(
            f"config.json: {field} is {value!r}; only one set of rope fields for the whole model "
            "can be served"
        )
    return {k: v for k, v in value.items() if v is not None}


def _kind(params: Mapping[str, Any]) -> str:
    kind = str(params.get("rope_type", params.get("type", "default")))
    return {"su": "longrope"}.get(kind, kind)
