"""Probe data: held-out text and task items, as tokens. What edges are measured on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jblock.blocks.spec_json import canonical_json
from jblock.zoo.edge_records import Probe
from jblock.zoo.records import ZooError


class Tokenizer(Protocol):
    """What is used of a tokenizers.Tokenizer."""

    def encode_batch(self, input: Sequence[str], add_special_tokens: bool = ...) -> Any:
        """Encodings of texts, with their `ids`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Tokens to score models on.

    Attributes:
      tokens: int32 [B, T], padded on the right.
      target: bool [B, T], the tokens that count: those a model should put out.
    """

    tokens: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> "Rows":
        """The first `count` rows."""
        return Rows(self.tokens[:count], self.target[:count])

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int(self.target.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeData:
    """What models are compared on.

    Attributes:
      name: for people.
      text: rows of text, every token but the first of a row counts.
      items: one row a task item: the tokens of the answer count, and an item is right when each of them is
        the best next token, which is when greedy decoding gives exactly them. None without a task.
    """

    name: str
    text: Rows
    items: Rows | None = None

    def half(self, second: bool) -> "ProbeData":
        """The half to choose on (False) or to score on (True): the first or last rows of the text, even or
        odd items (`metrics.Comparison.half` has their results)."""
        cut = len(self.text) // 2
        rows = slice(cut, None) if second else slice(None, cut)
        items = slice(int(second), None, 2)
        return ProbeData(
            f"{self.name}, {'second' if second else 'first'} half",
            Rows(self.text.tokens[rows], self.text.target[rows]),
            None
            if self.items is None
            else Rows(self.items.tokens[items], self.items.target[items]),
        )

    @property
    def record(self) -> Probe:
        """Name, digest and size, for an edge."""
        parts = [self.text, *([self.items] if self.items is not None else [])]
        digest = hashlib.sha256()
        for rows in parts:
            digest.update(canonical_json(list(rows.tokens.shape)).encode())
            digest.update(np.ascontiguousarray(rows.tokens, "<i4").tobytes())
            digest.update(np.packbits(rows.target).tobytes())
        tokens = sum(rows.num_targets for rows in parts)
        return Probe(name=self.name, digest=digest.hexdigest(), tokens=tokens)


def text_rows(
    tokenizer: Tokenizer, text: str, row_tokens: int, bos: int | None, max_rows: int | None = None
) -> Rows:
    """Text cut into rows of `row_tokens` tokens, each behind a `bos` where there is one. Of more rows than
    `max_rows` those are taken that lie evenly over the whole text.

    Raises:
      ZooError: it does not fill two rows.
    """
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    stream = [i for e in tokenizer.encode_batch(pieces, add_special_tokens=False) for i in e.ids]
    width = row_tokens - (bos is not None)
    there = len(stream) // width
    count = there if max_rows is None else min(there, max_rows)
    if count < 2:
        raise ZooError(
            f"the text has {len(stream)} tokens, {count} rows of {width} are to be taken of it: give at "
            f"least {2 * width}"
        )
    tokens = np.array(stream[: there * width], np.int32).reshape(there, width)
    tokens = tokens[np.arange(count) * there // count]
    if bos is not None:
        tokens = np.concatenate([np.full((count, 1), bos, np.int32), tokens], axis=1)
    target = np.ones(tokens.shape, bool)
    target[:, 0] = False
    return Rows(tokens, target)


def item_rows(tokenizer: Tokenizer, items: Sequence[Mapping[str, Any]], eos: int | None) -> Rows:
    """Task items as rows.

    Args:
      tokenizer: of the models.
      items: dicts of `prompt` and `answer`; `stop`, whether the model has to end after the answer (true where
        it is left out); `rendered`, whether a chat template put the special tokens into the prompt (false).
      eos: the id that ends an answer.

    Raises:
      ZooError: an item without prompt or answer, or no `eos` where one is wanted.
    """
    prompts = [
        tokenizer.encode_batch([str(i["prompt"])], add_special_tokens=not i.get("rendered"))[0]
        for i in items
    ]
    answers = tokenizer.encode_batch([str(i["answer"]) for i in items], add_special_tokens=False)
    rows = []
    for item, prompt, answer in zip(items, prompts, answers, strict=True):
        stop = [eos] if item.get("stop", True) else []
        if None in stop:
            raise ZooError('the model has no end token: give items with "stop": false')
        if not prompt.ids or not answer.ids:
            raise ZooError(f"item {item}: prompt and answer each need a token")
        rows.append((len(prompt.ids), [*prompt.ids, *answer.ids, *stop]))
    width = -(-max(len(ids) for _, ids in rows) // 4) * 4
    tokens = np.zeros((len(rows), width), np.int32)
    target = np.zeros((len(rows), width), bool)
    for row, (start, ids) in enumerate(rows):
        tokens[row, : len(ids)] = ids
        target[row, start : len(ids)] = True
    return Rows(tokens, target)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
      ZooError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ZooError(f"{path} is no UTF-8 text ({e}): convert it, as with iconv") from e


def read_items(path: Path) -> list[dict[str, Any]]:
    """Task items of a JSON Lines file.

    Raises:
      ZooError: a line that is no item.
    """
    items = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ZooError(f"{path}:{number}: {e}: give one JSON object a line") from e
        asks = isinstance(item, dict) and ("prompt" in item) != ("messages" in item)
        if not asks or "answer" not in item:
            raise ZooError(
                f'{path}:{number}: give {{"prompt": ..., "answer": ...}}, or "messages" for "prompt", which '
                "the model's chat template then renders"
            )
        items.append(item)
    if not items:
        raise ZooError(f"{path} has no items")
    return items
