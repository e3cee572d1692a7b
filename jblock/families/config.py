"""Strict reading of a Hugging Face config.json: a field that changes the maths is known or refused.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from collections.abc import Mapping
from typing import Any

from jblock.blocks.spec import RopeSpec


class ConfigError(ValueError):
    """A checkpoint's config that cannot be served: names the field, the value and the remedy."""


# What a program computes with holds no more.
_FLOAT32_MAX = 3.4e38

_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position",
}


def integer(
    config: Mapping[str, Any],
    field: str,
    default: int | None = None,
    least: int = 1,
    most: int = 2**31 - 1,
) -> int:
    """`config[field]` as an int from `least` to `most`; `default` when absent or null.

    Raises:
      ConfigError: not there and no default, or not such an integer.
    """
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {field!r}: add the model's value")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(
            f"config.json: {field} is {value!r}; give an integer from {least} to {most}"
        )
    return value


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """`config[field]` as a float over 0 that float32 holds; `default` when absent or null.

    Raises:
      ConfigError: not there and no default, or not such a number.
    """
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {field!r}: add the model's value")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"config.json: {field} is {value!r}; give a number")
    if not 0 < value <= _FLOAT32_MAX:
        raise ConfigError(
            f"config.json: {field} is {value!r}; give a number over 0 that float32 holds"
        )
    return float(value)


def flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """`config[field]` as a bool; `default` when absent or null.

    Raises:
      ConfigError: something else than true or false.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {field} is {value!r}; give true or false")
    return value


def require(config: Mapping[str, Any], field: str, allowed: tuple[Any, ...], why: str = "") -> None:
    """Refuses a field that is set to a value outside `allowed`; absent and null always pass.

    Raises:
      ConfigError: the field holds another value.
    """
    value = config.get(field)
    if value is None or any(type(value) is type(a) and value == a for a in allowed):
        return
    known = " or ".join(repr(a) for a in allowed) or "no value"
    raise ConfigError(
        f"config.json: {field} is {value!r}; only {known} can be served"
        + (f" ({why})" if why else "")
    )


def token_ids(config: Mapping[str, Any], field: str, vocab_size: int) -> tuple[int, ...]:
    """A token id field, written as null, one id or a list of ids, as a tuple without repeats.

    Raises:
      ConfigError: something else, or an id outside the vocabulary.
    """
    value = config.get(field)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise ConfigError(f"{field} has {i!r}; ids go from 0 to {vocab_size - 1} (vocab_size)")
    return tuple(dict.fromkeys(ids))


def rope(config: Mapping[str, Any]) -> RopeSpec:
    """The rotary embedding a config asks for.

    Raises:
      ConfigError: a rope type, field or value that is not known, or two spellings that disagree.
    """
    require(config, "partial_rotary_factor", (1.0, 1), "rope over part of a head is not known")
    scaling = _section(config, "rope_scaling")
    modern = _section(config, "rope_parameters")
    if "rope_theta" in config and config["rope_theta"] is not None:
        theta = number(config, "rope_theta")
        if "rope_theta" in modern and modern["rope_theta"] != theta:
            raise ConfigError(
                f"config.json: rope_theta is {theta!r} and rope_parameters.rope_theta "
                f"{modern['rope_theta']!r}; remove the wrong one"
            )
    else:
        theta = 10000.0
    theta = number(modern, "rope_theta", theta)
    if scaling and modern and _kind(scaling) != _kind(modern):
        raise ConfigError(
            f"config.json: rope_scaling asks for {_kind(scaling)!r} and rope_parameters for "
            f"{_kind(modern)!r}; remove the wrong one"
        )
    params = {**scaling, **modern}
    kind = _kind(params)
    extra = {k: v for k, v in params.items() if k not in ("rope_type", "type", "rope_theta")}
    if extra.get("partial_rotary_factor") in (1, 1.0):
        del extra["partial_rotary_factor"]
    if kind == "default" and not extra:
        return RopeSpec(theta=theta)
    if kind == "llama3" and extra.keys() == _LLAMA3.keys():
        return RopeSpec(
            kind="llama3",
            theta=theta,
            factor=number(extra, "factor"),
            low_freq_factor=number(extra, "low_freq_factor"),
            high_freq_factor=number(extra, "high_freq_factor"),
            original_max_position=integer(extra, "original_max_position_embeddings"),
        )
    raise ConfigError(
        f"config.json: rope of type {kind!r} with fields {sorted(extra)} is not known; known: "
        f"'default' without fields, 'llama3' with {sorted(_LLAMA3)}"
    )


def _section(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ConfigError(
            f"config.json: {field} is {value!r}; only one set of rope fields for the whole model "
            "can be served"
        )
    return {k: v for k, v in value.items() if v is not None}


def _kind(params: Mapping[str, Any]) -> str:
    return str(params.get("rope_type", params.get("type", "default")))
