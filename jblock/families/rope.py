"""The rotary embedding a config asks for, in every spelling and variant that is served."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from jblock.blocks.rope_spec import RopeSpec
from jblock.families.config import ConfigError, flag, integer, number

# Fields that each variant must have beside its type and theta.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
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
    sections = {f: _section(config, f) for f in ("rope_scaling", "rope_parameters")}
    given = {name: section for name, section in sections.items() if section}
    dim = functools.partial(
        _rotated, config, head_dim=head_dim, partial=partial, partial_field=partial_field
    )
    found = {
        name: _read(config, name, section, theta, theta_field, head_dim, dim(name, section))
        for name, section in (given or {"rope_parameters": {}}).items()
    }
    first, *others = found.values()
    if others and others[0] != first:
        raise ConfigError(
            f"config.json: rope_scaling describes {first} and rope_parameters {others[0]}; remove the "
            "wrong one"
        )
    return first


def _rotated(
    config: Mapping[str, Any],
    name: str,
    section: Mapping[str, Any],
    *,
    head_dim: int,
    partial: float | None,
    partial_field: str,
) -> int:
    """How many dimensions of a head are rotated."""
    field = "partial_rotary_factor"
    share = _either(config, name, section, partial_field, field, partial or 1.0)
    if share > 1 or (partial is None and share != 1):
        raise ConfigError(
            f"config.json: {partial_field} is {share!r}; "
            + (
                "rope over part of a head is not known here"
                if partial is None
                else "give a number up to 1"
            )
        )
    return int(head_dim * share)


def _read(
    config: Mapping[str, Any],
    name: str,
    section: Mapping[str, Any],
    theta: float,
    theta_field: str,
    head_dim: int,
    dim: int,
) -> RopeSpec:
    """What one section says, with the fields that stand outside of it. Fields that its variant does not
    have are not read, as in transformers."""
    kind = _kind(name, section)
    missing = [f for f in _REQUIRED.get(kind, ()) if section.get(f) is None]
    if kind not in _REQUIRED or missing:
        raise ConfigError(
            f"config.json: {name} asks for rope of type {kind!r}"
            + (f" and has no {missing[0]!r}" if missing else ", which is not known")
            + "; known: "
            + ", ".join(f"{k!r} with {list(v) or 'none'}" for k, v in _REQUIRED.items())
        )
    common: dict[str, Any] = {
        "theta": _either(config, name, section, theta_field, "rope_theta", theta),
        "dim": 0 if dim == head_dim else dim,
    }
    if kind == "linear":
        return RopeSpec(kind=kind, factor=number(section, "factor"), **common)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            factor=number(section, "factor"),
            low_freq_factor=number(section, "low_freq_factor"),
            high_freq_factor=number(section, "high_freq_factor"),
            original_max_position=integer(section, "original_max_position_embeddings"),
            **common,
        )
    if kind == "yarn":
        return _yarn(config, section, common)
    if kind == "longrope":
        return _longrope(config, section, common, dim)
    if kind == "dynamic":
        # It stretches sequences past max_position_embeddings only, where serving ends.
        number(section, "factor")
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
    name: str,
    section: Mapping[str, Any],
    field: str,
    inner_field: str,
    default: float,
) -> float:
    """A number that stands in the config or in its section `name`, if at all.

    Raises:
      ConfigError: it stands in both, with two values.
    """
    outside, inside = config.get(field), section.get(inner_field)
    if outside is not None and inside is not None and outside != inside:
        raise ConfigError(
            f"config.json: {field} is {outside!r} and {name}.{inner_field} {inside!r}; "
            "remove the wrong one"
        )
    return number(section, inner_field, number(config, field, default))


def _section(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ConfigError(
            f"config.json: {field} is {value!r}; only one set of rope fields for the whole model "
            "can be served"
        )
    return value


def _kind(name: str, section: Mapping[str, Any]) -> str:
    kinds = [str(k) for k in (section.get("rope_type"), section.get("type")) if k is not None]
    kinds = ["longrope" if k == "su" else k for k in kinds] or ["default"]
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"config.json: {name} has rope_type {kinds[0]!r} and type {kinds[1]!r}; remove the wrong one"
        )
    return kinds[0]
