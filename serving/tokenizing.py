"""Text to ids and back, without a generation: what Tokenize and Detokenize of every protocol do."""

from collections.abc import Sequence

from serving.errors import invalid
from serving.served_models import ServedModel
from serving.text import TextCodec

# Of a text that is only to be encoded, in tokens for each that the model takes: enough to see how long it is.
_LONGEST = 4


def codec_of(model: ServedModel) -> TextCodec:
    """The tokenizer of a model.

    Raises:
      RequestError: it has none.
    """
    if model.codec is None:
        raise invalid(f"model: {model.info.name} has no tokenizer; it takes ids only")
    return model.codec


async def encode(field: str, model: ServedModel, text: str, special: bool) -> tuple[int, ...]:
    """The ids of a text, which came in this field.

    Raises:
      RequestError: the model has no tokenizer, or the text is far longer than it takes.
    """
    codec, most = codec_of(model), _LONGEST * model.info.max_model_len
    ids = None
    if len(text) <= codec.most_characters(most):
        ids = await codec.encode(text, most, special=special)
    if ids is None:
        raise invalid(f"{field}: has more than {most} tokens; send less at a time")
    return ids


def decode(field: str, model: ServedModel, ids: Sequence[int], special: bool) -> str:
    """The text of ids, which came in this field, with that of special tokens if `special`.

    Raises:
      RequestError: the model has no tokenizer, one is no id, or they are far more than it takes.
    """
    codec, most = codec_of(model), _LONGEST * model.info.max_model_len
    if len(ids) > most:
        raise invalid(f"{field}: are {len(ids)}; send at most {most} at a time")
    for at, token in enumerate(ids):
        if not 0 <= token < model.info.vocab_size:
            raise invalid(
                f"{field}[{at}]: {token} is no token id of {model.info.name}; ids go from 0 to "
                f"{model.info.vocab_size - 1}"
            )
    return codec.decode(ids, special=special)
