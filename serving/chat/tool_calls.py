"""Tool calls in what a model writes, in the forms of the families that are served.

| form | written as | known by |
| --- | --- | --- |
| Hermes, Qwen | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number | `<tool_call>`
in the template | | Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or
`[TOOL_CALLS]name[ARGS]{...}` | `[TOOL_CALLS]` | | Llama 3 | `{"name": ..., "parameters": {...}}` and
nothing else, several with `;` between | `<|python_tag|>` or `<|start_header_id|>` |

What is no call after all stays text. These parsers look for fixed strings and read JSON; no pattern of a
client or of a model is ever run here. `responses.py` is for models that bring a `response_template`.
"""

import dataclasses
import json
import secrets
import string
from typing import Any

from serving.served_models import ServedModel

_DECODER = json.JSONDecoder()
_LETTERS = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
      id: names it in the answer that the client sends back.
      name: of the function.
      arguments: JSON, mostly an object.
    """

    id: str
    name: str
    arguments: str


class Parser:
    """Of a model that calls no tools: everything is text."""

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        """Text that is no call, and calls that are complete, of what came since the last call.

        Args:
          text: what the model wrote since.
          final: nothing follows.
        """
        return text, []


class HermesParser(Parser):
    """Calls between tags, beside text."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._called = False

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while True:
            before, found, after = self._held.partition(self._CLOSE if self._inside else self._OPEN)
            if not found:
                break
            self._held = after
            if self._inside:
                self._take(before, self._CLOSE, shown, calls)
            else:
                shown.append(self._text(before, True))
            self._inside = not self._inside
        if final and self._inside:
            # The end tag, or a part of it, may be what the limit of tokens cut off.
            end = len(self._held) - _overlap(self._held, self._CLOSE)
            self._take(self._held[:end], self._held[end:], shown, calls)
            self._held, self._inside = "", False
        elif not self._inside:
            keep = 0 if final else _overlap(self._held, self._OPEN)
            # Space before a call is none of the answer; it waits until it is known what follows.
            end = len(self._held) - keep
            if not final:
                end = len(self._held[:end].rstrip())
            shown.append(self._text(self._held[:end], final and self._called))
            self._held = self._held[end:]
        return "".join(shown), calls

    def _take(self, inside: str, close: str, shown: list[str], calls: list[ToolCall]) -> None:
        call = call_of(_json(inside), ("arguments", "parameters"))
        if call is None:
            shown.append(self._OPEN + inside + close)
        else:
            self._called = True
            calls.append(call)

    def _text(self, text: str, by_a_call: bool) -> str:
        """Text outside of calls; space beside them is dropped."""
        if by_a_call:
            text = text.rstrip()
        if self._called and not text.strip():
            return ""
        return text


class WholeParser(Parser):
    """Of families whose answer is either text or calls: it waits for the end where it may be calls."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        if self._is_text:
            return text, []
        self._held += text
        if not final and self.may_be_calls(self._held.lstrip()):
            return "", []
        held, self._held = self._held, ""
        calls = self.calls(held.strip()) if final else None
        if calls:
            return "", calls
        self._is_text = True
        return held, []

    def may_be_calls(self, text: str) -> bool:
        """Whether an answer that begins so may turn out to be calls."""
        raise NotImplementedError

    def calls(self, text: str) -> list[ToolCall] | None:
        """The calls of a whole answer; None: it is text."""
        raise NotImplementedError


class LlamaParser(WholeParser):
    """Llama 3's JSON."""

    _TAG = "<|python_tag|>"

    def may_be_calls(self, text: str) -> bool:
        return not text or text[0] == "{" or self._TAG.startswith(text[: len(self._TAG)])

    def calls(self, text: str) -> list[ToolCall] | None:
        rest = text.removeprefix(self._TAG).strip()
        found: list[ToolCall] = []
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):
                return None
            call = call_of(value, ("parameters", "arguments"))
            if call is None:
                return None
            found.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return found or None


class MistralParser(WholeParser):
    """Mistral's list, or names with arguments. Its marks are special tokens, which an answer's text is
    without."""

    _TAG, _ARGS = "[TOOL_CALLS]", "[ARGS]"

    def may_be_calls(self, text: str) -> bool:
        if not text or self._TAG.startswith(text[: len(self._TAG)]) or text[0] == "[":
            return True
        name = text.partition("{")[0].removesuffix(self._ARGS)
        return len(name) <= 64 and all(c in _LETTERS + "_-.[" for c in name)

    def calls(self, text: str) -> list[ToolCall] | None:
        rest = text.removeprefix(self._TAG).strip()
        if rest.startswith("["):
            value = _json(rest)
            items = value if isinstance(value, list) else [None]
            found = [call_of(v, ("arguments", "parameters"), _short_id()) for v in items]
            return [c for c in found if c is not None] if found and all(found) else None
        calls: list[ToolCall] = []
        while rest:
            name, brace, after = rest.partition("{")
            name = name.strip().removesuffix(self._ARGS)
            if not brace or not name or not all(c in _LETTERS + "_-." for c in name):
                return None
            try:
                value, end = _DECODER.raw_decode("{" + after)
            except (ValueError, RecursionError):
                return None
            arguments = json.dumps(value, ensure_ascii=False)
            calls.append(ToolCall(id=_short_id(), name=name, arguments=arguments))
            rest = ("{" + after)[end:].strip().removeprefix(self._TAG)
        return calls or None


def parser_of(model: ServedModel) -> type[Parser]:
    """The parser of a model's family, by its template."""
    source = model.template.tool_use if model.template else ""
    if "[TOOL_CALLS]" in source:
        return MistralParser
    if "<tool_call>" in source:
        return HermesParser
    if "<|python_tag|>" in source or "<|start_header_id|>" in source:
        return LlamaParser
    return Parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def call_of(value: Any, names: tuple[str, ...], call_id: str = "") -> ToolCall | None:
    """The call that an object describes, its arguments under the first of these names; None: it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments: Any = next((value[name] for name in names if name in value), {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = call_id or f"call_{secrets.token_hex(12)}"
    return ToolCall(id=call_id, name=value["name"], arguments=arguments)


def _short_id() -> str:
    """Nine letters and digits: what Mistral's templates take."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    for count in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:count]):
            return count
    return 0
