"""What stands in a field of a model's answer, read as its `response_template` says.

The parsers and their arguments are those of transformers' chat response parsing, version 1 of its templates.
Patterns come with checkpoints: this runs where a pattern that never ends can be stopped.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import regex

from jblock.chat.call_list import read_call_list

# What stands in for strings that were taken out of a text; JSON has no such characters.
_OPEN, _CLOSE = "\x01", "\x02"
_PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")
# A quoted string, which stays as it is, or a key without quotes.
_BARE_KEY = regex.compile(r'"(?:\\.|[^"\\])*"|(?<=[{,])(\s*)(\w+)(\s*):')

Arguments = Mapping[str, Any]


class ResponseError(ValueError):
    """A template is none, or an answer does not fit it; the message names the field."""


def parse(text: str, parser: str, arguments: Arguments) -> Any:
    """The value of a text.

    Args:
      text: of one field.
      parser: one of PARSERS.
      arguments: `content_args` of the field.

    Raises:
      ValueError: the text has no such value.
    """
    return PARSERS[parser](text, arguments)


def _text(text: str, arguments: Arguments) -> str:
    return text.strip() if arguments.get("strip", True) else text


def _int(text: str, arguments: Arguments) -> int:
    return int(_text(text, arguments))


def _float(text: str, arguments: Arguments) -> float:
    return float(_text(text, arguments))


def _bool(text: str, arguments: Arguments) -> bool:
    return _text(text, arguments).lower() in ("true", "1")


def _json(text: str, arguments: Arguments) -> Any:
    """JSON, or what models write for it: keys without quotes, strings between marks of their own."""
    delimiters = arguments.get("string_delims", [])
    if delimiters and (_OPEN in text or _CLOSE in text):
        raise ResponseError("json: the text has characters that stand in for strings")
    strings: list[str] = []

    def take(found: Any) -> str:
        strings.append(found.group(1))
        return f"{_OPEN}{len(strings) - 1}{_CLOSE}"

    plain = text
    for begin, end in delimiters:
        pattern = regex.escape(begin) + "(.*?)" + regex.escape(end)
        plain = regex.sub(pattern, take, plain, flags=regex.DOTALL)
    if arguments.get("unquoted_keys", False):
        plain = _BARE_KEY.sub(_quoted, plain)
    for at, string in enumerate(strings):
        plain = plain.replace(f"{_OPEN}{at}{_CLOSE}", json.dumps(string))
    try:
        return json.loads(plain)
    except json.JSONDecodeError as error:
        if arguments.get("allow_non_json"):
            return _text(text, arguments)
        raise ResponseError(f"json: {error}") from error


def _quoted(found: Any) -> str:
    before, key, after = found.groups()
    return found.group(0) if key is None else f'{before}"{key}"{after}:'


def _inner(text: str, arguments: Arguments) -> Any:
    """The value of a part, by the parser that is given for parts."""
    parser = arguments.get("value_parser")
    if parser is None:
        return text
    return parse(text, parser.get("name", "text"), parser.get("args", {}))


def _xml_inline(text: str, arguments: Arguments) -> dict[str, Any]:
    """Tags as a dict, found by a pattern with the groups `key` and `value`."""
    pattern, merges = arguments.get("tag_pattern"), arguments.get("merge_duplicates", False)
    if pattern is None:
        raise ResponseError("xml-inline: content_args has no tag_pattern")
    values: dict[str, Any] = {}
    merged: set[str] = set()
    for found in regex.finditer(pattern, text, flags=regex.DOTALL):
        groups = found.groupdict()
        key = groups.get("key")
        if key is None:
            raise ResponseError("xml-inline: tag_pattern has no group key")
        value = _inner(groups.get("value", ""), arguments)
        if not merges or key not in values:
            values[key] = value
            continue
        if key not in merged:
            values[key] = [values[key]]
            merged.add(key)
        values[key].append(value)
    return values


def _kv_lines(text: str, arguments: Arguments) -> dict[str, Any]:
    """A key and a value a line."""
    separator = arguments.get("kv_sep", ":")
    values = {}
    for line in text.split(arguments.get("line_sep", "\n")):
        line = _text(line, arguments)
        if line and separator in line:
            key, value = line.split(separator, 1)
            values[_text(key, arguments)] = _inner(_text(value, arguments), arguments)
    return values


PARSERS: Mapping[str, Callable[[str, Arguments], Any]] = {
    "text": _text,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "json": _json,
    "xml-inline": _xml_inline,
    "kv-lines": _kv_lines,
    "python-call-list": lambda text, arguments: read_call_list(text),
}


def check_transform(transform: Any) -> None:
    """Nothing, where each string of a transform is a placeholder or has none.

    Raises:
      ResponseError: one is mixed with text.
    """
    if isinstance(transform, dict | list):
        for part in transform.values() if isinstance(transform, dict) else transform:
            check_transform(part)
        return
    is_text = isinstance(transform, str) and not _PLACEHOLDER.fullmatch(transform)
    if is_text and _PLACEHOLDER.search(transform):
        raise ResponseError(f"transform: {transform[:80]!r} mixes a placeholder with text")


def transformed(transform: Any, scope: Mapping[str, Any]) -> Any:
    """A transform with its placeholders filled in: `{name}`, and `{name.key}` for what a dict holds.

    Raises:
      ResponseError: the scope has no such thing.
    """
    if isinstance(transform, dict):
        return {name: transformed(part, scope) for name, part in transform.items()}
    if isinstance(transform, list):
        return [transformed(part, scope) for part in transform]
    found = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if found is None:
        return transform
    value: Any = scope
    for key in found.group(1).split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ResponseError(f"transform: there is no {found.group(1)[:80]!r}")
        value = value[key]
    return value


def coerced(value: Any, parameters: Mapping[str, Mapping[str, Any]]) -> Any:
    """Tool calls with arguments that are strings made what the tool's schema says they are.

    Args:
      value: of a field, whatever it is.
      parameters: `properties` of each tool's parameters, by the tool's name.
    """
    if isinstance(value, list):
        return [coerced(item, parameters) for item in value]
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        return value
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return value
    properties = parameters.get(name, {})
    for key, argument in arguments.items():
        types = _types(properties[key]) if key in properties else ()
        if types and isinstance(argument, str):
            arguments[key] = _as_one_of(argument, types)
        elif types and isinstance(argument, list) and "array" not in types:
            arguments[key] = [_as_one_of(a, types) if isinstance(a, str) else a for a in argument]
    return value


def _types(schema: Any) -> tuple[str, ...]:
    """The types that a schema allows, in its order."""
    if not isinstance(schema, dict):
        return ()
    declared = schema.get("type")
    types = [declared] if isinstance(declared, str) else []
    if isinstance(declared, list):
        types += [name for name in declared if isinstance(name, str)]
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or []:
            types += _types(choice)
    if schema.get("nullable") and "null" not in types:
        types.append("null")
    return tuple(types)


def _as_one_of(text: str, types: tuple[str, ...]) -> Any:
    """The value of the first type that the text has; else the text."""
    for name in types:
        try:
            return _AS_TYPE[name](text)
        except (ValueError, KeyError):
            continue
    return text


def _as_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _as_number(text: str) -> int | float:
    number = float(text)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(text)
    return int(number) if number.is_integer() and "." not in text else number


def _as_boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return word in ("true", "1")


def _as_null(text: str) -> None:
    if text.strip() not in ("null", "None"):
        raise ValueError(text)


def _as_container(kind: type, text: str) -> Any:
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


_AS_TYPE: Mapping[str, Callable[[str], Any]] = {
    "integer": _as_integer,
    "number": _as_number,
    "boolean": _as_boolean,
    "null": _as_null,
    "object": lambda text: _as_container(dict, text),
    "array": lambda text: _as_container(list, text),
}
