"""Chat templates: messages to the text that an instruct model was trained on.

Rendered as Hugging Face does: a sandboxed jinja2 environment in which blocks leave no blank lines, with
`raise_exception` and `strftime_now`.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

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
    from jinja2 import sandbox

    config = _json(folder / "tokenizer_config.json")
    source = _source(folder, config)
    if source is None:
        raise CheckpointError(
            f"{name} has no chat template, and there are messages to render: give prompts and text, or "
            "convert it with its chat template"
        )

    def fail(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    tokens = {
        n: _token(config.get(n)) for n in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as e:
        raise CheckpointError(f"the chat template of {name} cannot be read: {e}") from e

    def render(messages: Messages, begin: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=begin, **tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise CheckpointError(f"the chat template of {name} refuses {messages}: {e}") from e

    return render


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return data if isinstance(data, dict) else {}
