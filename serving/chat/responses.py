"""Answers of models that say how they are to be read: tool calls, and reasoning, by a `response_template`.

The template may have patterns, which are code of others, so an answer is read when it is over, in the process
that renders chats. One that does not fit its template stays text.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from serving.chat.renderer import Renderer, RenderError
from serving.chat.tool_calls import Parser, ToolCall, call_of
from serving.served_models import ServedModel

# Names under which templates put what a model thought; the first is the one that clients know.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ResponseParser(Parser):
    """Holds an answer to a request with tools until it is over; `read` then says what it is.

    Attributes:
      token_ids: of the answer; templates name special tokens, which its text is without.
      stopped: a stop string ended it.
    """

    def __init__(
        self,
        model: ServedModel,
        prompt: Sequence[int],
        tools: Sequence[Mapping[str, Any]],
        stops: Sequence[str],
    ):
        assert model.codec is not None and model.template is not None
        self.token_ids: list[int] = []
        self.stopped = False
        self._name, self._codec = model.info.name, model.codec
        self._template = model.template.response_template
        self._prompt, self._tools, self._stops = prompt, tools, stops
        self._text = ""

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        self._text += text
        return (self._text if final else ""), []

    async def read(self, renderer: Renderer) -> tuple[str, str, list[ToolCall]]:
        """Content, reasoning and calls of the answer, which is over."""
        answer = self._codec.decode(self.token_ids, special=True)
        if self.stopped:
            at = max(answer.rfind(stop) for stop in self._stops)
            answer = answer[:at] if at >= 0 else answer
        try:
            message = await renderer.parse(
                {
                    "response_template": self._template,
                    "prompt": self._codec.decode(self._prompt, special=True),
                    "answer": answer,
                    "tools": self._tools,
                }
            )
        except RenderError as error:
            logging.warning("%s: an answer was not read, and is text: %s", self._name, error)
            return self._text, "", []
        calls = [_call(value) for value in _flat(message.get("tool_calls") or [])]
        whole = [call for call in calls if call is not None]
        if len(whole) < len(calls):
            return self._text, "", []
        return _text(message.get("content")), _text(_reasoning(message)), whole


def _flat(calls: Any) -> list[Any]:
    """Calls of a field that repeats, of one that does not, or of one that is a list each time."""
    items = calls if isinstance(calls, list) else [calls]
    return [call for item in items for call in (item if isinstance(item, list) else [item])]


def _call(value: Any) -> ToolCall | None:
    function = value.get("function", value) if isinstance(value, dict) else None
    given = value.get("id") if isinstance(value, dict) else None
    name = given if isinstance(given, str) and given else f"call_{secrets.token_hex(12)}"
    return call_of(function, ("arguments", "parameters"), name)


def _reasoning(message: Mapping[str, Any]) -> Any:
    return next((message[name] for name in _REASONING if message.get(name) is not None), None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
