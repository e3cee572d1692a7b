"""How JSON is written that keeps to a schema."""

from typing import Any

# One space, or a line break and an indentation, wherever JSON may have space: a model that likes spaces would
# else write nothing more. Given as overrides, since a schema may bring options of its own.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\n\x20{0,20})?",
    "coerce_one_of": False,
    "lenient": False,
}
