"""The tokenizer files of a checkpoint: what the zoo keeps, and what it refuses."""

from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.source import read_json

# tokenizer.json is what serves; the rest is for chat templates, special tokens and export.
FILES = (
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


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the zoo keeps of a tokenizer.

    Attributes:
      files: name -> bytes; tokenizer.json is always among them.
      largest_id: the largest id it can give.
      made: tokenizer.json was made here, from a SentencePiece model.
    """

    files: dict[str, bytes]
    largest_id: int
    made: bool

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the files that the checkpoint has itself, sorted."""
        return tuple(sorted(self.files.keys() - ({"tokenizer.json"} if self.made else set())))


def read_tokenizer(path: Path) -> TokenizerFiles | None:
    """The tokenizer in a checkpoint folder; None when there is none.

    Raises:
      CheckpointError: a tokenizer that cannot be served, or a tokenizer.json that does not load.
    """
    files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    made = "tokenizer.json" not in files and "tokenizer.model" in files
    if made:
        from checkpoints import sentencepiece_model

        config = read_json(path / "tokenizer_config.json", required=False)
        added = read_json(path / "added_tokens.json", required=False)
        text = sentencepiece_model.convert(files["tokenizer.model"], config, added)
        files["tokenizer.json"] = text.encode()
    elif "tokenizer.json" not in files:
        if "vocab.json" not in files:
            return None
        raise CheckpointError(
            f"{path} has vocab.json but no tokenizer.json: make one (transformers: AutoTokenizer."
            "from_pretrained(folder).save_pretrained(folder)), or remove the tokenizer files to "
            "serve token ids only"
        )
    return from_files(files, path, made)


def from_files(files: dict[str, bytes], path: Path, made: bool = False) -> TokenizerFiles:
    """A tokenizer of these files, one of them tokenizer.json.

    Args:
      files: name -> bytes.
      path: where they come from.
      made: tokenizer.json was made from a SentencePiece model.

    Raises:
      CheckpointError: tokenizer.json does not load.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # plain Exception, or PanicException, which is not even that
        raise CheckpointError(f"{path}/tokenizer.json cannot be loaded: {e}") from e
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return TokenizerFiles(files=files, largest_id=largest, made=made)
