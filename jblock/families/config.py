"""Strict reading of a Hugging Face config.json: a field that changes the maths is known or refused.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's config that cannot be served: names the field, the value and the remedy."""


# What a program computes with holds no more.
_FLOAT32_MAX = 3.4e38


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


def token_ids(
    config: Mapping[str, Any], field: str, vocab_size: int, file: str = "config.json"
) -> tuple[int, ...]:
    """A token id field, written as null, one id or a list of ids, as a tuple without repeats.

    Raises:
      ConfigError: something else, or an id outside the vocabulary.
    """
    value = config.get(field)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise ConfigError(
                f"{file}: {field} has {i!r}, which the model cannot give: ids go from 0 to "
                f"{vocab_size - 1} (vocab_size); correct it there, or take it out"
            )
    return tuple(dict.fromkeys(ids))


def one_of(
    config: Mapping[str, Any], field: str, known: Mapping[str, str], default: str | None = None
) -> str:
    """What `known` has for `config[field]`, or for `default` when it is absent or null.

    Raises:
      ConfigError: another value.
    """
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"config.json: {field} is {value!r}; served: {', '.join(map(repr, known))}"
        )
    return known[value]
