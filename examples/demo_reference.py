"""What transformers generated, and whether the server generated the same: the token rule.

Two correct float32 programs round differently, so where the two best logits nearly tie, either
token is right, and everything after it differs. `compare` allows a first difference at such a place
and nowhere else.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

# Bound on the error of a logit between transformers' float32 and ours; the engine's tests hold it.
LOGIT_ERROR = 1e-4
# A choice closer than this may fall either way (docs/architecture.md, "Exactness").
NEAR_TIE = 10 * LOGIT_ERROR
# Stands for the end-of-sequence token, whichever id that is.
END = -1


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question and what transformers answered.

    Attributes:
      model: name in family.json.
      prompt: text.
      prompt_ids: its token ids.
      max_tokens: bound on the answer.
      tokens: generated ids; END closes an answer that ended by itself.
      text: of the answer.
      gaps: for each of `tokens`, the best logit minus the second best.
      expected: the right answer, which even the reference may miss; None where there is none.
    """

    model: str
    prompt: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    tokens: tuple[int, ...]
    text: str
    gaps: tuple[float, ...]
    expected: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer compares.

    Attributes:
      same: identical, or identical up to a near tie.
      position: of the first difference; None when there is none.
      reason: of a mismatch, for people.
    """

    same: bool
    position: int | None = None
    reason: str = ""


def load(path: pathlib.Path) -> list[Item]:
    """Reads the file that examples/make_references.py writes.

    Raises:
      DemoError: there is none, or it is damaged.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return [_item(item) for item in items]
    except FileNotFoundError as error:
        raise DemoError(
            f"{path} is not there; take it from the repository, or write it anew: "
            "python -m examples.make_references"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(
            f"{path} is damaged ({error!r}); take it from the repository again"
        ) from error


def _item(item: dict) -> Item:
    tokens = list(item["output_ids"])
    if item["finish"] == "stop":
        tokens[-1] = END
    if len(tokens) != len(item["gaps"]):
        raise ValueError(f"{len(tokens)} output_ids but {len(item['gaps'])} gaps")
    return Item(
        model=item["model"],
        prompt=item["prompt"],
        prompt_ids=tuple(item["prompt_ids"]),
        max_tokens=item["max_new_tokens"],
        tokens=tuple(tokens),
        text=item["output"],
        gaps=tuple(item["gaps"]),
        expected=item.get("expected"),
    )


def compare(item: Item, token_ids: Sequence[int], finish_reason: str | None, text: str) -> Verdict:
    """Holds an answer of the server against the reference.

    Args:
      item: the reference.
      token_ids: the server's ids, without the end-of-sequence token.
      finish_reason: "stop" when the model ended the answer.
      text: the server's text.
    """
    tokens = (*token_ids, END) if finish_reason == "stop" else tuple(token_ids)
    position = next(
        (i for i, (a, b) in enumerate(zip(tokens, item.tokens, strict=False)) if a != b), None
    )
    if position is not None:
        gap = item.gaps[position]
        if gap < NEAR_TIE:
            return Verdict(same=True, position=position)
        return Verdict(
            same=False,
            position=position,
            reason=f"token {position} is {_name(tokens[position])}, transformers has "
            f"{_name(item.tokens[position])} and leads by {gap:g} (a near tie is under {NEAR_TIE:g})",
        )
    if len(tokens) != len(item.tokens):
        return Verdict(
            same=False,
            position=min(len(tokens), len(item.tokens)),
            reason=f"{len(tokens)} tokens, transformers has {len(item.tokens)}",
        )
    if text != item.text:
        return Verdict(
            same=False, reason=f"equal ids, but text {text!r}; transformers has {item.text!r}"
        )
    return Verdict(same=True)


def _name(token: int) -> str:
    return "the end of the answer" if token == END else str(token)
