"""From the messages of a request to the ids of its prompt."""

import dataclasses
from typing import Any

import grpc

from jblock.chat.render import Conversation
from jblock.chat.template_files import ChatTemplate
from serving.chat.renderer import Renderer, RenderError
from serving.errors import RequestError, invalid
from serving.served_models import ServedModel

_MAX_MESSAGES = 10_000


def template_of(model: ServedModel) -> ChatTemplate:
    """The chat template of a model.

    Raises:
      RequestError: it has none.
    """
    if model.codec is None or model.template is None:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"messages: {model.info.name} has no chat template; send a prompt, or convert the "
            f"model again with "
            "its chat template",
        )
    return model.template


async def chat_ids(
    model: ServedModel, conversation: Conversation, renderer: Renderer
) -> tuple[int, ...]:
    """The ids of a conversation, rendered by the model's template and known to fit.

    Raises:
      RequestError: the model has no template, the template does not render these messages, or they are
        too long.
    """
    template = template_of(model)
    codec, most = model.codec, model.info.max_model_len - 1
    assert codec is not None
    if not conversation.messages:
        raise invalid("messages: is empty; send at least one message")
    if len(conversation.messages) > _MAX_MESSAGES:
        raise invalid(f"messages: are more than {_MAX_MESSAGES}; send fewer")
    request: dict[str, Any] = {
        "source": template.source(conversation.tools is not None),
        "special_tokens": dict(template.special_tokens),
        "added": codec.added_tokens,
        "control": template.control_tokens,
        "conversation": dataclasses.asdict(conversation),
    }
    try:
        pieces = await renderer.render(request)
    except RenderError as error:
        if error.refused:
            raise invalid(str(error)) from error
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"messages: the chat template of {model.info.name} failed: {error}; send other "
            f"messages, or have the "
            "operator look at the template",
        ) from error
    length = sum(len(text) for text, _ in pieces)
    ids: tuple[int, ...] | None = None
    if length <= codec.most_characters(most):
        try:
            ids = await codec.encode_pieces(pieces, most)
        except ValueError as error:
            raise invalid(f"messages: {error}") from error
    if ids is None:
        raise invalid(
            f"messages: make a prompt of {length} characters, which are more tokens than "
            f"{model.info.name} takes; "
            f"it takes at most {most}; send fewer, or shorter ones"
        )
    if not ids:
        raise invalid("messages: make an empty prompt; send other messages")
    if max(ids) >= model.info.vocab_size:
        raise invalid(
            f"messages: make the id {max(ids)}, {model.info.name} has ids from 0 to "
            f"{model.info.vocab_size - 1}; leave that token out"
        )
    return ids
