"""Probe and training data of the commands that measure and train: files to tokens of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from jblock.adapt.probe import ProbeData, Rows, Tokenizer, item_rows, read_items, text_rows
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

ROW_TOKENS = 128


def tokenizer(zoo: Zoo, chain: Chain) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      CheckpointError: it has none.
    """
    from tokenizers import Tokenizer as Loaded

    if chain.tokenizer is None:
        raise CheckpointError(
            f"{chain.name} has no tokenizer, and probes are text: convert it with one"
        )
    loaded: Any = Loaded.from_file(str(zoo.tokenizer_path(chain.tokenizer) / "tokenizer.json"))
    return loaded


def by_model(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """--items as [MODEL=]FILE: model -> file; a file alone is for all models.

    Raises:
      CheckpointError: a model that is none of `names`.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if equals and name not in names:
            raise CheckpointError(f"--items {text!r}: {name!r} is none of {', '.join(names)}")
        for one in [name] if equals else names:
            found[one] = Path(path if equals else text)
    return found


def probe(
    zoo: Zoo, chain: Chain, text: Path, items: Path | None, tokens: int, max_items: int
) -> ProbeData:
    """What a model is measured on: `tokens` of a text file, and up to `max_items` task items.

    Raises:
      CheckpointError, ZooError, OSError: files that cannot be read or hold too little.
    """
    name = text.name if items is None else f"{text.name}, {items.name}"
    rows = train_text(zoo, chain, text, tokens // ROW_TOKENS)
    return ProbeData(name, rows, train_items(zoo, chain, items, max_items) if items else None)


def digest(rows: Rows) -> str:
    """sha256 (hex) of rows, for provenance."""
    return ProbeData("", rows).record.digest


def train_text(zoo: Zoo, chain: Chain, path: Path, max_rows: int | None = None) -> Rows:
    """Rows of a text file."""
    content = path.read_text(encoding="utf-8")
    return text_rows(tokenizer(zoo, chain), content, ROW_TOKENS, chain.bos_token_id, max_rows)


def train_items(zoo: Zoo, chain: Chain, path: Path, max_items: int | None = None) -> Rows:
    """Rows of a file of task items."""
    eos = next(iter(chain.eos_token_ids), None)
    return item_rows(tokenizer(zoo, chain), read_items(path)[:max_items], eos)
