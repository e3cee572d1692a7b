"""Control tokens in users' text stay text: they are marked before a template sees them.

As transformers' `sanitize_control_tokens`: each whole control token in a string of the request is put
between two characters of private use, which a request cannot bring itself. After rendering the text
between such a pair is encoded without added tokens. What a template joins from pieces of user text is
not found."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_START, _END = "\U000f0000", "\U000f0001"
_LONE = re.compile(f"[{_START}{_END}]")


def pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """What matches any of these tokens; a longer one before one it contains."""
    longest_first = sorted({t for t in tokens if t}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark(value: Any, tokens: re.Pattern[str]) -> Any:
    """Plain JSON with the tokens in all its strings marked; names of fields are left."""
    if isinstance(value, str):
        return tokens.sub(f"{_START}\\g<0>{_END}", _LONE.sub("", value))
    if isinstance(value, Mapping):
        return {name: mark(item, tokens) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, tokens) for item in value]
    return value


def pieces(text: str, tokens: re.Pattern[str]) -> list[tuple[str, bool]]:
    """(text, whether it is a marked token) in order, without the markers.

    A template that splits strings may have parted a pair of markers: a lone one is dropped, and what
    stands on its sides stays apart, so that it cannot join to a token.
    """
    parts = re.split(f"{_START}({tokens.pattern}){_END}|[{_START}{_END}]", text)
    return [(part, at % 2 == 1) for at, part in enumerate(parts) if part]


def unmarked(text: str) -> str:
    """The text without markers."""
    return _LONE.sub("", text)
