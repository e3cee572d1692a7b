"""Everything but generation: models, tokenizers, health and version."""

import time
from typing import Any

import msgspec

from jblock.chat.render import Conversation
from jblock.command import own_version
from serving import tokenizing
from serving.chat.prompts import chat_ids
from serving.chat.renderer import Renderer
from serving.dispatcher import Dispatcher
from serving.errors import invalid, unavailable
from serving.http.calls import Call
from serving.http.chat_fields import ChatRequest, conversation_of
from serving.http.exchange import decode
from serving.http.fields import only
from serving.served_models import ServedModel


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text, or a conversation, to encode."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Ids to decode."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class Models:
    """Answers them."""

    def __init__(self, dispatcher: Dispatcher, renderer: Renderer):
        self._dispatcher, self._renderer = dispatcher, renderer
        self._begun = int(time.time())

    async def list(self, call: Call) -> None:
        """`GET /v1/models`."""
        if not self._dispatcher.ready.is_set():
            raise unavailable("engine: is warming up; try again when health says so")
        models = self._dispatcher.models_of(call.tenant)
        if named := call.scope.get("path_params", {}).get("model"):
            models = [self._dispatcher.find("model", named, call.tenant)]
        await call.sender.json({"object": "list", "data": [self._card(m) for m in models]})

    async def get(self, call: Call) -> None:
        """`GET /v1/models/<model>`."""
        name = call.scope["path_params"]["model"]
        await call.sender.json(self._card(self._dispatcher.find("model", name, call.tenant)))

    async def health(self, call: Call) -> None:
        """`GET /health`: 200 while requests are served."""
        if not self._dispatcher.serves:
            raise unavailable("server: does not serve now; try again later")
        await call.sender.json({"status": "SERVING"})

    async def version(self, call: Call) -> None:
        """`GET /version`."""
        await call.sender.json({"version": own_version()})

    async def tokenize(self, call: Call) -> None:
        """`POST /tokenize`: of a text, or of a rendered conversation."""
        fields = decode(call.body, TokenizeRequest)
        model = self._find(call, fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise invalid("prompt: send either prompt or messages")
        if fields.messages is not None:
            ids = await chat_ids(model, _conversation(fields), self._renderer)
        else:
            special = fields.add_special_tokens is not False
            ids = await tokenizing.encode("prompt", model, fields.prompt or "", special)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": model.info.max_model_len,
            "tokens": ids,
        }
        if fields.return_token_strs:
            codec = tokenizing.codec_of(model)
            answer["token_strs"] = [codec.token(i) for i in ids]
        await call.sender.json(answer)

    async def detokenize(self, call: Call) -> None:
        """`POST /detokenize`: the text of ids, that of special tokens too."""
        fields = decode(call.body, DetokenizeRequest)
        model = self._find(call, fields.model)
        only(fields, "skip_special_tokens", False)
        text = tokenizing.decode("tokens", model, fields.tokens, special=True)
        await call.sender.json({"prompt": text})

    async def tokenizer_info(self, call: Call) -> None:
        """`GET /tokenizer_info`: what evaluation harnesses ask: the special tokens, and the chat template."""
        model = self._find(call, None)
        template = model.template
        tokens = dict(template.special_tokens) if template else {}
        await call.sender.json(
            {
                **tokens,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.info.max_model_len,
                "vocab_size": model.info.vocab_size,
                "chat_template": template.default if template else None,
            }
        )

    def _find(self, call: Call, given: str | None) -> ServedModel:
        """The model that is asked; the only one there is needs no name."""
        name = call.name(given)
        models = self._dispatcher.models_of(call.tenant)
        if not name and len(models) == 1:
            name = models[0].info.name
        model = self._dispatcher.find("model", name, call.tenant)
        tokenizing.codec_of(model)  # Refuses one that has none.
        return model

    def _card(self, model: ServedModel) -> dict[str, Any]:
        """A model as clients list it; `parent` is what an adapter rides on."""
        info = model.info
        return {
            "id": info.name,
            "object": "model",
            "created": self._begun,
            "owned_by": "jblock",
            "root": f"{info.name}@{info.version}",
            "parent": info.base.partition("@")[0] or None,
            "max_model_len": info.max_model_len,
            "permission": [],
        }


def _conversation(fields: TokenizeRequest) -> Conversation:
    return conversation_of(
        ChatRequest(
            messages=fields.messages or [],
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            chat_template_kwargs=fields.chat_template_kwargs,
        )
    )
