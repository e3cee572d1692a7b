"""Chats of items that the converter probes with: messages as the text that an instruct model expects."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from jblock.chat import environment, template_files
from jblock.chat.render import Conversation, render

Messages = Sequence[Mapping[str, Any]]


def renderer(folder: Path, name: str) -> Callable[[Messages, bool], str]:
    """(messages, whether the model's turn is to begin) -> text with its special tokens.

    Args:
      folder: of the tokenizer: chat_template.jinja, or tokenizer_config.json with chat_template.
      name: of the model, for errors.

    Raises:
      CheckpointError: there is no template, or it is no jinja2.
    """
    import jinja2

    try:
        template = template_files.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if template is None:
        raise CheckpointError(
            f"{name} has no chat template, and there are messages to render: give prompts and text, or "
            "convert it with its chat template"
        )
    source, tokens = template.default, template.special_tokens
    try:
        environment.compiled(source)
    except jinja2.TemplateError as e:
        raise CheckpointError(f"the chat template of {name} cannot be read: {e}") from e

    def text(messages: Messages, begin: bool) -> str:
        try:
            return render(
                source, Conversation(messages=messages, add_generation_prompt=begin), tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise CheckpointError(f"the chat template of {name} refuses {messages}: {e}") from e

    return text
