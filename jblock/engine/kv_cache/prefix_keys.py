"""Names for the content of KV pages: what decided every number in them, and nothing else.

A page's key is a chain of hashes over the components and deltas the chain has up to the end of the KV
group, the tenant's salt, and all tokens up to the end of the page. No model name and no version is in
it: two chains with the same components share, a changed component never matches.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from jblock.zoo.records import Step


def root_key(steps: Sequence[Step], salt: str) -> bytes:
    """Key of the empty prefix.

    Args:
      steps: of the chain, up to the last attention of the group.
      salt: the tenant's; pages are only found under the salt they were computed for.
    """
    digest = hashlib.sha256()
    for step in steps:
        digest.update(b"\0".join(i.encode() for i in (step.component, *step.deltas)) + b"\1")
    digest.update(salt.encode())
    return digest.digest()


def page_keys(parent: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """One key for each full page of `tokens`, the first following on `parent`."""
    keys = []
    for begin in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[begin : begin + page_size], np.int32).tobytes()
        parent = hashlib.sha256(parent + page).digest()
        keys.append(parent)
    return keys
