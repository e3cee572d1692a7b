"""A model's `response_template`: which fields its answers have, and what begins and ends each.

Version 1 of the form that transformers defined, checked as it checks them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import regex

from jblock.chat.response_content import PARSERS, ResponseError, check_transform

_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_FIELD_KEYS = {
    *("open", "open_pattern", "close", "close_pattern", "content", "content_args"),
    *("repeats", "join", "optional", "transform", "transform_each"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchor:
    """What begins or ends a field.

    Attributes:
      pattern: finds it.
      is_literal: it is one of some texts, and no pattern of the model's maker.
      can_grow: of those texts one begins with another, so what was found may be a part of more.
    """

    pattern: Any
    is_literal: bool
    can_grow: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a message.

    Attributes:
      name: of the field.
      open: what begins it; None: it is what stands in no other field.
      close: what ends it; None: the end of the answer.
      content, content_args: how its text is read.
      repeats: it is a list, an item for each time that it stands there.
      join: what stands between the texts where it is one text of several; None: it is not.
      optional: an answer may be without.
      transform: what is made of its value; None: nothing.
      transform_each: the transform is of each item of the value.
    """

    name: str
    open: Anchor | None
    close: Anchor | None
    content: str
    content_args: Mapping[str, Any]
    repeats: bool
    join: str | None
    optional: bool
    transform: Any
    transform_each: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseTemplate:
    """How answers are read.

    Attributes:
      defaults: of a message.
      fields: by name, in their order.
      start: what stands before an answer; its last place in the prompt counts.
      implicit: the field that has no beginning, if there is one.
    """

    defaults: Mapping[str, Any]
    fields: Mapping[str, Field]
    start: Anchor
    implicit: Field | None


def load(spec: Any) -> ResponseTemplate:
    """The template that a checkpoint describes.

    Raises:
      ResponseError: it describes none; the message names what is wrong.
    """
    if not isinstance(spec, dict):
        raise ResponseError(f"response_template: is {type(spec).__name__}, not an object")
    if spec.get("version", 1) != 1:
        raise ResponseError(f"response_template.version: {spec['version']!r} is not known; 1 is")
    _check_keys("response_template", spec, _KEYS)
    raw = spec.get("fields", {})
    if not isinstance(spec.get("defaults", {}), dict):
        raise ResponseError("response_template.defaults: is no object")
    if not isinstance(raw, dict) or not raw:
        raise ResponseError("response_template.fields: has no fields")
    fields = {name: _field(name, value) for name, value in raw.items()}
    implicit = [field for field in fields.values() if field.open is None]
    if len(implicit) > 1:
        names = ", ".join(field.name for field in implicit)
        raise ResponseError(f"response_template.fields: {names} have no beginning; one may")
    start = _anchor("response_template", spec, "start_anchor", "start_anchor_pattern")
    if start is None:
        raise ResponseError("response_template.start_anchor: is missing")
    return ResponseTemplate(
        defaults=spec.get("defaults", {}),
        fields=fields,
        start=start,
        implicit=implicit[0] if implicit else None,
    )


def _check_keys(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(given) - known:
        raise ResponseError(f"{where}: has unknown keys {', '.join(sorted(unknown))[:200]}")


def _field(name: str, given: Any) -> Field:
    where = f"response_template.fields.{name[:40]}"
    if not isinstance(given, dict):
        raise ResponseError(f"{where}: is no object")
    _check_keys(where, given, _FIELD_KEYS)
    content, join = given.get("content", "text"), given.get("join")
    if content not in PARSERS:
        raise ResponseError(f"{where}.content: is none of {', '.join(PARSERS)}")
    begin = _anchor(where, given, "open", "open_pattern")
    close = _anchor(where, given, "close", "close_pattern")
    if join is not None and not (isinstance(join, str) and given.get("repeats", False)):
        raise ResponseError(f"{where}.join: is no text, or the field does not repeat")
    transform, each = given.get("transform"), given.get("transform_each", False)
    if not isinstance(each, bool) or (each and transform is None):
        raise ResponseError(f"{where}.transform_each: is no bool, or there is no transform")
    if transform is not None:
        check_transform(transform)
    elif any(anchor.pattern.groupindex for anchor in (begin, close) if anchor is not None):
        raise ResponseError(f"{where}: its patterns have named groups, and there is no transform")
    return Field(
        name=name,
        open=begin,
        close=close,
        content=content,
        content_args=given.get("content_args", {}),
        repeats=given.get("repeats", False),
        join=join,
        optional=given.get("optional", True),
        transform=transform,
        transform_each=each,
    )


def _anchor(where: str, given: Mapping[str, Any], literal: str, pattern: str) -> Anchor | None:
    """A text, one of some texts, or a pattern."""
    if literal in given and pattern in given:
        raise ResponseError(f"{where}: has both {literal} and {pattern}; one of them may be there")
    if literal in given:
        texts = [given[literal]] if isinstance(given[literal], str) else given[literal]
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise ResponseError(f"{where}.{literal}: is no text, and no list of texts")
        if not texts:
            raise ResponseError(f"{where}.{literal}: is an empty list")
        longest_first = sorted(dict.fromkeys(texts), key=len, reverse=True)
        found = regex.compile("|".join(map(regex.escape, longest_first)), regex.DOTALL)
        grows = any(a != b and a.startswith(b) for a in texts for b in texts)
        return Anchor(pattern=found, is_literal=True, can_grow=grows)
    if pattern in given:
        try:
            found = regex.compile(given[pattern], regex.DOTALL)
        except regex.error as error:
            raise ResponseError(f"{where}.{pattern}: {error}") from error
        return Anchor(pattern=found, is_literal=False, can_grow=False)
    return None
