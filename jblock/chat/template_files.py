"""Chat templates as checkpoints bring them: in which of a tokenizer's files they stand."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The tokens that every tokenizer may name, in the order in which transformers adds them.
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What a model's tokenizer says of chats.

    Attributes:
      default: source of the template.
      tool_use: of the one for requests with tools; mostly the same.
      special_tokens: bos_token and so on, those there are.
      control_tokens: tokens that only the template may write, where the tokenizer lists them; None:
        its special tokens, and those that stand in the template.
      response_template: how the model's answers are to be read, where it says so.
    """

    default: str
    tool_use: str
    special_tokens: Mapping[str, str]
    control_tokens: tuple[str, ...] | None = None
    response_template: Any = None

    def source(self, tools: bool) -> str:
        """Of the template for a request with tools, or without."""
        return self.tool_use if tools else self.default


def load(folder: Path) -> ChatTemplate | None:
    """The chat template of a tokenizer's folder; None: it has none.

    Raises:
      ValueError: a file of it cannot be read.
    """
    config = _json(folder / "tokenizer_config.json")
    sources = _sources(folder, config)
    default = sources.get("default")
    if default is None:
        return None
    names = config.get("chat_control_tokens")
    return ChatTemplate(
        default=default,
        tool_use=sources.get("tool_use", default),
        special_tokens=_special_tokens(config, _json(folder / "special_tokens_map.json")),
        control_tokens=tuple(map(str, names)) if isinstance(names, list) else None,
        response_template=config.get("response_template"),
    )


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, str):
        found = {"default": found}
    items = found.items() if isinstance(found, dict) else ()
    return {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}


def _special_tokens(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by the names that templates know."""
    tokens = {name: _token(config.get(name)) or _token(other.get(name)) for name in NAMED_TOKENS}
    more = config.get("extra_special_tokens")
    if isinstance(more, dict):
        tokens |= {name: _token(value) for name, value in more.items() if isinstance(name, str)}
    return {name: token for name, token in tokens.items() if token}


def _token(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return data if isinstance(data, dict) else {}
