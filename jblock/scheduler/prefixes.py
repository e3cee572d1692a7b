"""Which prompts an agent has computed lately, so that the next one with the same beginning goes there too.

An agent finds cached pages by content; the scheduler only guesses where they are, from what it sent. A guess
that is wrong costs the prefill that no guess would have cost too.
"""

import array
import collections
import hashlib

from jblock.engine.api import Request

# Tokens between two ends of a prefix that are told apart: a page of the default size.
_CHUNK = 64
# Most chunks of one prompt that are looked at, and most that are known of one agent.
_MOST_OF_A_PROMPT = 256
_MOST_KNOWN = 65_536


def prefix_digests(request: Request) -> list[bytes]:
    """A digest for each beginning of the prompt that is a multiple of 64 tokens long, shortest first. The
    cache's salt and the model are part of it: a prompt of another tenant decides nothing."""
    state = hashlib.blake2b(digest_size=16)
    for text in (request.cache_salt, request.model):
        state.update(len(text).to_bytes(8, "little") + text.encode())
    digests = []
    tokens = (*request.token_ids, *request.generated)
    for end in range(_CHUNK, min(len(tokens), _CHUNK * _MOST_OF_A_PROMPT) + 1, _CHUNK):
        state.update(array.array("q", tokens[end - _CHUNK : end]).tobytes())
        digests.append(state.digest())
    return digests


class KnownPrefixes:
    """The prefixes of one agent; those not used for longest are forgotten first."""

    def __init__(self) -> None:
        self._known: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def match(self, digests: list[bytes]) -> int:
        """How many of a prompt's digests are known, from the shortest on."""
        for count, digest in enumerate(digests):
            if digest not in self._known:
                return count
        return len(digests)

    def add(self, digests: list[bytes]) -> None:
        """The agent computes a prompt."""
        for digest in reversed(digests):  # The longest is to go first.
            self._known[digest] = None
            self._known.move_to_end(digest)
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """The agent's cache is gone."""
        self._known.clear()
