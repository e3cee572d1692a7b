"""Probe and training data of the commands that measure and train: files to tokens of a model."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import chat
from checkpoints.errors import CheckpointError
from jblock.adapt.probe import (
    ProbeData,
    Rows,
    Tokenizer,
    item_rows,
    read_items,
    read_text,
    text_rows,
)
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_LEAST_ROWS = 4  # of text: two to choose on, two to score on
_TRAIN_ROW_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What models are measured on.

    Attributes:
      text: held-out text, or conversations: JSON Lines (.jsonl) of `messages`.
      items: of each model, the file of its task items.
      tokens: of the text.
      row_tokens: of a row of text, at most: what is further back than that is never seen. A model of fewer
        positions has shorter rows.
      max_items: of a task.
    """

    text: Path
    items: Sequence[str] = ()
    tokens: int = 8192
    row_tokens: int = 512
    max_items: int = 4000

    def __post_init__(self):
        for name in ("tokens", "row_tokens", "max_items"):
            if getattr(self, name) < 2:
                raise CheckpointError(f"--{name} {getattr(self, name)}: give at least 2")


def tokenizer(zoo: Zoo, chain: Chain) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      CheckpointError: it has none.
    """
    from tokenizers import Tokenizer as Loaded

    path = _tokenizer_folder(zoo, chain) / "tokenizer.json"
    try:
        loaded: Any = Loaded.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Bare Exception, or PanicException, which is not even that.
        raise CheckpointError(f"{path} is no tokenizer ({e}); convert {chain.name} again") from e
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


def probe(zoo: Zoo, chain: Chain, options: ProbeOptions, names: Sequence[str] = ()) -> ProbeData:
    """What a model is measured on.

    Args:
      zoo: has the model's tokenizer.
      chain: the model.
      options: files and sizes.
      names: all models that `options.items` may name; by default this one.

    Raises:
      CheckpointError, ZooError, OSError: files that cannot be read or hold too little.
    """
    items = by_model(options.items, names or [chain.name]).get(chain.name)
    name = options.text.name if items is None else f"{options.text.name}, {items.name}"
    width = min(options.row_tokens, chain.max_position or options.row_tokens)
    rows = _text(zoo, chain, options.text, width, max(_LEAST_ROWS, options.tokens // width))
    if len(rows) < _LEAST_ROWS:
        raise CheckpointError(
            f"{options.text} fills {len(rows)} rows of {width} tokens, and {_LEAST_ROWS} are the least, two "
            "to choose on and two to score on: give more text or fewer --row_tokens"
        )
    return ProbeData(
        name, rows, train_items(zoo, chain, items, options.max_items) if items else None
    )


def digest(rows: Rows) -> str:
    """sha256 (hex) of rows, for provenance."""
    return ProbeData("", rows).record.digest


def train_text(zoo: Zoo, chain: Chain, path: Path) -> Rows:
    """Rows of a file to train on."""
    return _text(zoo, chain, path, _TRAIN_ROW_TOKENS, None)


def train_items(zoo: Zoo, chain: Chain, path: Path, max_items: int | None = None) -> Rows:
    """Rows of a file of task items."""
    eos = next(iter(chain.eos_token_ids), None)
    items = read_items(path)[:max_items]
    if any("messages" in item for item in items):
        render = chat.renderer(_template_folder(zoo, chain), chain.name)
        items = [
            {**item, "prompt": render(item["messages"], True), "rendered": True}
            if "messages" in item
            else item
            for item in items
        ]
    return item_rows(tokenizer(zoo, chain), items, eos)


def _text(zoo: Zoo, chain: Chain, path: Path, width: int, max_rows: int | None) -> Rows:
    content = read_text(path)
    if path.suffix == ".jsonl":
        render = chat.renderer(_template_folder(zoo, chain), chain.name)
        content = "\n".join(render(m, False) for m in _conversations(path, content))
        return text_rows(tokenizer(zoo, chain), content, width, None, max_rows)
    return text_rows(tokenizer(zoo, chain), content, width, chain.bos_token_id, max_rows)


def _conversations(path: Path, content: str) -> list[chat.Messages]:
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["messages"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise CheckpointError(
                f'{path}:{number}: give {{"messages": [...]}}, or text in a file of another suffix'
            ) from e
    return found


def _template_folder(zoo: Zoo, chain: Chain) -> Path:
    """Where the chat template of a model is."""
    if chain.tokenizer_files is None:
        return _tokenizer_folder(zoo, chain)
    zoo.files("sources", chain.tokenizer_files)  # checks it
    return zoo.folder("sources", chain.tokenizer_files)


def _tokenizer_folder(zoo: Zoo, chain: Chain) -> Path:
    if chain.tokenizer is None:
        raise CheckpointError(
            f"{chain.name} has no tokenizer, and probes are text: convert it with one"
        )
    return zoo.tokenizer_path(chain.tokenizer)
