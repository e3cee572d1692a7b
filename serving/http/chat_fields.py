"""The fields of a chat completion, and the conversation they describe."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from jblock.chat.render import Conversation
from serving.errors import invalid
from serving.http.fields import Common, only

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
        "reasoning",
        "thinking",
        # What answers of this API carry, and conversations bring back; nothing but null says anything.
        "refusal",
        "audio",
        "function_call",
        "annotations",
    }
)
_NULL_FIELDS = ("refusal", "audio", "function_call")


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """Something that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    # vLLM's.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = None


def wants_tools(fields: ChatRequest) -> bool:
    """Whether the model is told of tools."""
    return bool(fields.tools) and fields.tool_choice != "none"


def forces_call(fields: ChatRequest) -> bool:
    """Whether a tool has to be called."""
    return isinstance(fields.tool_choice, NamedTool) or fields.tool_choice == "required"


def conversation_of(fields: ChatRequest) -> Conversation:
    """The conversation of a body.

    Raises:
      RequestError: a message has a form that no template takes.
    """
    only(fields, "add_special_tokens", False)
    if not fields.messages:
        raise invalid("messages: is empty; send at least one message")
    if fields.parallel_tool_calls is False and wants_tools(fields) and not forces_call(fields):
        raise invalid(
            'parallel_tool_calls: false can be promised with tool_choice "required" only; leave it out'
        )
    begin = fields.add_generation_prompt
    goes_on = bool(fields.continue_final_message)
    if goes_on and begin:
        raise invalid(
            "continue_final_message: cannot go with add_generation_prompt; set add_generation_prompt false"
        )
    tools = [_tool(tool) for tool in fields.tools or ()] if wants_tools(fields) else None
    return Conversation(
        messages=[_message(at, message) for at, message in enumerate(fields.messages)],
        tools=tools,
        documents=fields.documents,
        add_generation_prompt=not goes_on if begin is None else begin,
        continue_final_message=goes_on,
        variables=fields.chat_template_kwargs or {},
    )


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool as templates write it: only the fields that were given."""
    function = {k: v for k, v in msgspec.to_builtins(tool.function).items() if v is not None}
    return {"type": "function", "function": function}


def _message(at: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{at}]"
    for name in message:
        if name not in _MESSAGE_FIELDS:
            raise invalid(f"{where}.{name[:40]}: is no field of a message; leave it out")
    for name in _NULL_FIELDS:
        if message.get(name) is not None:
            raise invalid(f"{where}.{name}: is not supported; leave it out")
    role = message.get("role")
    if role not in _ROLES:
        raise invalid(f"{where}.role: {str(role)[:40]!r} is none of {', '.join(_ROLES)}")
    found = {k: v for k, v in message.items() if v is not None and k != "annotations"}
    if role == "developer":  # Newer clients' name for it; templates know the older one.
        found["role"] = "system"
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{where}.content: is neither a text nor a list of parts")
    elif content is None and role in ("system", "developer", "user", "tool"):
        raise invalid(f"{where}.content: is missing; send a text")
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(f"{where}.tool_calls", found["tool_calls"])
    return found


def _part(where: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise invalid(
            f"{where}: {str(kind)[:40]!r} is no part of text; this server takes text only"
        )
    if part.get("type") != "text" or set(part) - {"type", "text"}:
        raise invalid(f"{where}: has other fields than type and text; leave them out")
    return dict(part)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls that the model made before. Templates want arguments as objects, clients send them as JSON in a
    string."""
    if not isinstance(calls, list):
        raise invalid(f"{where}: is no list of calls")
    found = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(
                f"{where}[{at}].function.name: is missing; send the call as it was answered"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise invalid(
                    f"{where}[{at}].function.arguments: is no JSON; send an object"
                ) from None
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
