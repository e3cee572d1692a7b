"""What is known of one call for an answer, whichever protocol it came by."""

import contextlib
import dataclasses
import time
import uuid
from typing import Literal

from serving.answers import Usage
from serving.tenants import ANONYMOUS, Tenant

# Longer ids, and those with spaces or what no header holds, are replaced.
_LONGEST_ID = 128


def request_id_of(given: str | bytes | None) -> str:
    """The id that a client gave its call, or one drawn where it gave none that can be used."""
    text = given.decode("latin-1") if isinstance(given, bytes) else given or ""
    if 0 < len(text) <= _LONGEST_ID and all("!" <= c <= "~" for c in text):
        return text
    return uuid.uuid4().hex


@dataclasses.dataclass(kw_only=True)
class CallInfo:
    """One call.

    Attributes:
      protocol: by which it came.
      tenant: who asks.
      request_id: names it in logs, the client's and ours.
      begin: when it came, by the monotonic clock, in seconds.
      held: gives its places in the queue back once the answer is sent.
      usage: what it took so far.
    """

    protocol: Literal["grpc", "http", "open_inference", "offline"]
    tenant: Tenant = ANONYMOUS
    request_id: str = dataclasses.field(default_factory=lambda: request_id_of(None))
    begin: float = dataclasses.field(default_factory=time.monotonic)
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    usage: Usage = dataclasses.field(default_factory=Usage)
