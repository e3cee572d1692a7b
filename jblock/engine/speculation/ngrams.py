"""Drafts from what a sequence has said before: the tokens that followed the last time it said the same.

Prompt look-up decoding (Saxena, 2023), with the hash chains of LZ77 (RFC 1951, section 4) to find the
longest of the latest places, and its copies that overlap their own end, so that a loop is drafted on.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Tokens that have to agree before a place is looked at.
_KEY = 2
# Places looked at, the latest first, and tokens compared at each.
_PLACES = 8
LONGEST = 8


class Match(NamedTuple):
    """Tokens that may follow.

    Attributes:
      length: how many tokens before them agree, from 2 to LONGEST.
      tokens: drafted, in order.
    """

    length: int
    tokens: tuple[int, ...]


class NgramIndex:
    """What a sequence has said, by the pairs of tokens in it: some 100 bytes a token."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        # For each token, where the pair in front of it stood before, followed by another; -1: nowhere.
        self._before: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, more: Sequence[int]) -> None:
        """Takes the tokens that come next."""
        tokens, latest = self._tokens, self._latest
        for token in more:
            place = len(tokens)
            key = tuple(tokens[-_KEY:])
            self._before.append(latest.get(key, -1) if place >= _KEY else -1)
            if place >= _KEY:
                latest[key] = place
            tokens.append(token)

    def draft(self, most: int) -> Match | None:
        """Up to `most` tokens that followed the longest end that stands elsewhere too, the latest of equals;
        None: not even its last two tokens do."""
        tokens = self._tokens
        count = len(tokens)
        place = self._latest.get(tuple(tokens[-_KEY:]), -1) if count >= _KEY else -1
        found, longest = -1, 0
        for _ in range(_PLACES):
            if place < 0:
                break
            length = _KEY
            limit = min(LONGEST, place)
            while length < limit and tokens[place - 1 - length] == tokens[count - 1 - length]:
                length += 1
            if length > longest:
                found, longest = place, length
                if length == LONGEST:
                    break
            place = self._before[place]
        if found < 0:
            return None
        drafted: list[int] = []
        for at in range(found, found + most):
            drafted.append(tokens[at] if at < count else drafted[at - count])
        return Match(longest, tuple(drafted))
