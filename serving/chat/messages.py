"""A chat of `jblock.v1` as the conversation that templates are given, and back."""

import json
from typing import Any

from jblock.chat.render import Conversation
from serving.errors import invalid
from serving.v1 import jblock_pb2 as pb

_ROLES = ("system", "user", "assistant", "tool")
_TEXTS = ("content", "reasoning_content", "tool_call_id", "name")


def conversation_of(chat: pb.Chat) -> Conversation:
    """The conversation of a request.

    Raises:
      RequestError: a message has a form that no template takes.
    """
    if not chat.messages:
        raise invalid("chat.messages: is empty; send at least one message")
    return Conversation(
        messages=[_message(f"chat.messages[{i}]", m) for i, m in enumerate(chat.messages)],
        tools=[_tool(f"chat.tools[{i}]", t) for i, t in enumerate(chat.tools)] or None,
        add_generation_prompt=not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
        variables={
            name: _json(f"chat.template_variables.{name[:40]}", value)
            for name, value in chat.template_variables.items()
        },
    )


def _message(where: str, message: pb.ChatMessage) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise invalid(f"{where}.role: {message.role[:40]!r} is none of {', '.join(_ROLES)}")
    found: dict[str, Any] = {"role": message.role}
    found |= {name: getattr(message, name) for name in _TEXTS if getattr(message, name)}
    if message.role != "assistant" or not message.tool_calls:
        found.setdefault("content", "")
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _json(
                        f"{where}.tool_calls[{at}].arguments", call.arguments or "{}"
                    ),
                },
            }
            for at, call in enumerate(message.tool_calls)
        ]
    return found


def _tool(where: str, tool: pb.Function) -> dict[str, Any]:
    if not tool.name:
        raise invalid(f"{where}.name: is empty; name the function")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = _json(f"{where}.parameters", tool.parameters)
    return {"type": "function", "function": function}


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid(f"{where}: {text[:40]!r} is no JSON") from None
