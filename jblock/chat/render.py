"""Messages to text by a chat template, as transformers' `apply_chat_template(tokenize=False)` does it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jblock.chat import environment

Message = Mapping[str, Any]

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# Names under which a message's reasoning is given; the first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatError(ValueError):
    """A template cannot render these messages; the message names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a template is given. Values are plain JSON.

    Attributes:
      messages: each with a role, and mostly with content: a string, or a list of parts.
      tools: JSON schemas of functions that the model may call; None: none.
      documents: for templates of retrieval; None: none.
      add_generation_prompt: the assistant's turn is to begin.
      continue_final_message: the text ends with the last message, which the model goes on with.
      variables: what else the template reads, such as enable_thinking.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def render(source: str, conversation: Conversation, special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation.

    Args:
      source: of the template.
      conversation: what to render.
      special_tokens: bos_token and so on, those that the tokenizer has.

    Raises:
      ChatError: a variable that the template does not read, messages that it refuses, or a final message that
        cannot be continued.
      jinja2.TemplateError and others: as the template raises them.
    """
    _check_variables(source, conversation.variables, special_tokens)
    messages = [_with_reasoning(_present(message)) for message in conversation.messages]
    if not environment.takes_parts(source):
        messages = [_with_text(message) for message in messages]
    final = _tagged(messages) if conversation.continue_final_message else ""
    text = environment.compiled(source).render(
        **{**special_tokens, **conversation.variables},
        messages=messages,
        tools=conversation.tools,
        documents=conversation.documents,
        add_generation_prompt=conversation.add_generation_prompt,
    )
    return _up_to_tag(text, final) if conversation.continue_final_message else text


def _check_variables(
    source: str, given: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    if not given:
        return
    declared = environment.variables(source) - special_tokens.keys()
    for name in given:
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            raise ChatError(
                f"chat_template_kwargs.{name[:40]}: the model's chat template reads no such "
                f"variable; it reads "
                f"{known}"
            )


def _present(message: Message) -> dict[str, Any]:
    """Without the fields that are null: many templates would write None."""
    return {name: value for name, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning under each name that templates look for."""
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """Content of parts as one text, for a template that knows no parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [p if isinstance(p, str) else p.get("text", "") for p in content]
    return {**message, "content": "\n".join(texts)}


def _tagged(messages: list[dict[str, Any]]) -> str:
    """Puts a tag behind the last message's text; the text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1] = {**messages[-1], "content": content + _TAG}
        return content
    if isinstance(content, list):
        for at in reversed(range(len(content))):
            if isinstance(content[at], Mapping) and "text" in content[at]:
                text = content[at]["text"]
                tagged = [*content[:at], {**content[at], "text": text + _TAG}, *content[at + 1 :]]
                messages[-1] = {**messages[-1], "content": tagged}
                return text
    raise ChatError("continue_final_message: the last message has no text to go on with")


def _up_to_tag(text: str, final: str) -> str:
    tag = _TAG.strip()
    if final.strip() not in text or tag not in text:
        raise ChatError(
            "continue_final_message: the chat template does not show the last message as it is; end with a "
            "user's message and set add_generation_prompt"
        )
    at = text.rindex(tag)
    if text[at : at + len(_TAG)] == _TAG:
        return text[:at]
    return text[:at].rstrip()  # The template strips the ends of messages.
