"""The models a server offers, each with its tokenizer and its chat template."""

import dataclasses
import pathlib
from collections.abc import Iterable

from absl import logging

from jblock.chat import template_files
from jblock.chat.template_files import ChatTemplate
from jblock.engine import api
from serving.text import TextCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model, its tokenizer and its chat template, if it has them."""

    info: api.ModelInfo
    codec: TextCodec | None
    template: ChatTemplate | None = None


def load_models(
    infos: tuple[api.ModelInfo, ...], before: Iterable[ServedModel] = ()
) -> dict[str, ServedModel]:
    """Reads the tokenizers; models that share one share it in memory too.

    Args:
      infos: what is served.
      before: models that were served; their tokenizers, which never change in a zoo, are used again.

    Raises:
      ValueError: a tokenizer cannot be read.
    """
    known = {m.info.tokenizer_path: (m.codec, m.template) for m in before if m.codec is not None}
    for path in {info.tokenizer_path for info in infos if info.tokenizer_path} - known.keys():
        known[path] = TextCodec.load(path), _template(path)
    return {
        i.name: ServedModel(info=i, codec=codec, template=template)
        for i in infos
        for codec, template in (known.get(i.tokenizer_path, (None, None)),)
    }


def _template(path: str) -> ChatTemplate | None:
    """The chat template of a tokenizer. One that cannot be read is none: the model answers prompts all
    the same."""
    try:
        return template_files.load(pathlib.Path(path))
    except (ValueError, OSError) as error:
        logging.warning("chat template: %s; its models take no messages", error)
        return None
