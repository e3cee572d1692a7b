"""The tokenizer files of a checkpoint: what the zoo keeps, and what it refuses."""

from pathlib import Path

from checkpoints.errors import CheckpointError

# tokenizer.json is what serves; the rest is for chat templates, special tokens and export.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_SLOW = ("tokenizer.model", "vocab.json", "spiece.model")


def read_tokenizer(path: Path) -> dict[str, bytes] | None:
    """Name -> bytes of the tokenizer files in a checkpoint folder; None when there are none.

    Raises:
      CheckpointError: a tokenizer that cannot be served, or a tokenizer.json that does not load.
    """
    if not (path / "tokenizer.json").is_file():
        slow = [name for name in _SLOW if (path / name).is_file()]
        if not slow:
            return None
        raise CheckpointError(
            f"{path} has {slow[0]} but no tokenizer.json: make one (transformers: AutoTokenizer."
            "from_pretrained(folder).save_pretrained(folder)), or remove the tokenizer files to "
            "serve token ids only"
        )
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    load(files["tokenizer.json"], path)
    return files


def load(data: bytes, path: Path):
    """A `tokenizers.Tokenizer` from the bytes of tokenizer.json.

    Raises:
      CheckpointError: it does not load.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"{path}/tokenizer.json cannot be loaded: {e}") from e


def largest_id(data: bytes, path: Path) -> int:
    """The largest id a tokenizer can give."""
    return max(load(data, path).get_vocab(with_added_tokens=True).values(), default=-1)
