"""Calls as models trained on Python write them: `[get_weather(city="Paris"), now()]`.

The grammar is that of `python-call-list` in transformers' chat response parsing: keyword arguments alone, and
literals as values, so nothing is evaluated.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

_SPACE = re.compile(r"[ \t\n\r]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_STRING = re.compile(r"""'((?:[^'\\\n\r]|\\.)*)'|"((?:[^"\\\n\r]|\\.)*)\"""", re.DOTALL)
_FOUR_DIGITS = re.compile(r"u([0-9a-fA-F]{4})")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_ESCAPES = {**{c: c for c in "\\'\"/"}, "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_CONSTANTS = {
    **{"True": True, "true": True, "False": False, "false": False},
    **{"None": None, "null": None},
}
# Integers that JSON readers agree on, and how deep lists and dicts lie in each other.
_MAX_INTEGER, _MAX_DIGITS = 2**53 - 1, 17
_MAX_DEPTH = 100


def read_call_list(text: str) -> list[dict[str, Any]]:
    """The calls, each with name and arguments.

    Raises:
      ValueError: the text is no such list; the message says where it is not.
    """
    reader = _Reader(text)
    reader.expect("[")
    calls = reader.items("]", reader.call)
    if not reader.is_over():
        reader.fail("something follows the list")
    return calls


class _Reader:
    def __init__(self, text: str):
        self._text, self._at = text, 0

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"python-call-list: {message}, at character {self._at}")

    def is_over(self) -> bool:
        self._skip()
        return self._at == len(self._text)

    def expect(self, character: str) -> None:
        if not self._sees(character):
            self.fail(f"{character!r} is missing")
        self._at += 1

    def items(self, close: str, item: Callable[[], Any]) -> list[Any]:
        """What stands between commas, up to `close`."""
        found: list[Any] = []
        while not self._sees(close) or found:
            found.append(item())
            if self._sees(close):
                break
            self.expect(",")
        self._at += 1
        return found

    def call(self) -> dict[str, Any]:
        name = self._name("a function")
        self.expect("(")
        return {"name": name, "arguments": self._unique(self.items(")", self._argument))}

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _sees(self, character: str) -> bool:
        self._skip()
        return self._text.startswith(character, self._at)

    def _name(self, what: str) -> str:
        self._skip()
        found = _NAME.match(self._text, self._at)
        if found is None:
            self.fail(f"no name of {what}")
        self._at = found.end()
        return found[0]

    def _argument(self) -> tuple[str, Any]:
        key = self._name("an argument")
        self.expect("=")
        return key, self._value(0)

    def _pair(self, depth: int) -> tuple[str, Any]:
        if not (self._sees("'") or self._sees('"')):
            self.fail("a key is no string")
        key = self._string()
        self.expect(":")
        return key, self._value(depth)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.fail("a name stands twice")
        return found

    def _value(self, depth: int) -> Any:
        """A value that lies in so many lists and dicts."""
        if self._sees("'") or self._sees('"'):
            return self._string()
        for begin, close in (("[", "]"), ("{", "}")):
            if self._sees(begin):
                if depth >= _MAX_DEPTH:
                    self.fail(f"more than {_MAX_DEPTH} lists and dicts in each other")
                self._at += 1
                if begin == "[":
                    return self.items(close, lambda: self._value(depth + 1))
                return self._unique(self.items(close, lambda: self._pair(depth + 1)))
        number = _NUMBER.match(self._text, self._at)
        if number is not None:
            return self._number(number)
        name = _NAME.match(self._text, self._at)
        if name is None or name[0] not in _CONSTANTS:
            self.fail("no string, number, list, dict, True, False or None")
        self._at = name.end()
        return _CONSTANTS[name[0]]

    def _number(self, found: re.Match[str]) -> int | float:
        value: int | float
        if found[1] is None and found[2] is None:
            # Digits are counted first: reading very many takes long.
            if len(found[0]) > _MAX_DIGITS or abs(int(found[0])) > _MAX_INTEGER:
                self.fail("an integer beyond 2^53 - 1")
            value = int(found[0])
        else:
            value = float(found[0])
            if math.isinf(value):
                self.fail("a number that is too large")
        self._at = found.end()
        return value

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        if found is None:
            self.fail("a string that does not end")
        body = found[1] if found[1] is not None else found[2]
        if any("\ud800" <= c <= "\udfff" for c in body):
            self.fail("a lone surrogate")
        parts, start = [], 0
        while (escape := body.find("\\", start)) != -1:
            parts.append(body[start:escape])
            if body[escape + 1] in _ESCAPES:
                parts.append(_ESCAPES[body[escape + 1]])
                start = escape + 2
                continue
            code, start = self._code_point(body, escape + 1)
            parts.append(chr(code))
        self._at = found.end()
        return "".join(parts) + body[start:]

    def _code_point(self, body: str, at: int) -> tuple[int, int]:
        """Of an escape in hex, or of two that make a pair; and where it ends."""
        found = _FOUR_DIGITS.match(body, at)
        if found is None:
            self.fail("an unknown escape")
        code, end = int(found[1], 16), found.end()
        low = _LOW_SURROGATE.match(body, end)
        if 0xD800 <= code <= 0xDBFF and low is not None:
            code, end = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00), low.end()
        if 0xD800 <= code <= 0xDFFF:
            self.fail("a lone surrogate")
        return code, end
