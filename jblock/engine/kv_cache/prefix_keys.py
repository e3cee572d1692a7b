"""Names for the content of KV pages: what decided every number in them, and nothing else.

A page's key has two halves. One names the layer: a digest of the components and deltas of the chain up
to and including its attention. The other names the tokens: a chain of hashes over the tenant's salt and
all tokens up to the end of the page. No model name, version or block is in either: chains whose layers
agree find each other's pages, a changed component never matches, and a new cut into blocks renames
nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jblock.zoo.records import Step


def layer_digests(steps: Sequence[Step], attentions: Iterable[int]) -> list[bytes]:
    """One digest for each attention of a chain.

    Args:
      steps: of the chain.
      attentions: indices of the steps that are attentions, ascending.
    """
    digests = step_digests(steps)
    return [digests[i + 1] for i in attentions]


def step_digests(steps: Sequence[Step]) -> list[bytes]:
    """What names the first 0, 1, ... steps of a chain; one more than it has steps."""
    digest = hashlib.sha256()
    digests = [digest.digest()]
    for step in steps:
        digest.update(b"\0".join(s.encode() for s in (step.component, *step.deltas)) + b"\1")
        digests.append(digest.digest())
    return digests


def activated(digests: Iterable[bytes], at: int) -> tuple[bytes, ...]:
    """What names the layers of an activated LoRA behind its invocation at token `at`: before it they are its
    base's, and where that ends decides what follows."""
    return tuple(hashlib.sha256(d + at.to_bytes(8, "little")).digest() for d in digests)


def token_root(salt: str) -> bytes:
    """The hash of no tokens. Pages are only found under the salt they were computed for."""
    return hashlib.sha256(salt.encode()).digest()


def token_hashes(parent: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """One hash for each full page of `tokens`, the first following on `parent`."""
    hashes = []
    for begin in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[begin : begin + page_size], np.int32).tobytes()
        parent = hashlib.sha256(parent + page).digest()
        hashes.append(parent)
    return hashes
