"""What agents tell each other of sequences whose chain goes over several of them."""

import msgspec


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Home to agent: hold KV for a sequence.

    Attributes:
      key: names this opening; the home gives each a new one, so that nothing meant for an older one is taken
        for it.
      model: a chain name.
      version: of it.
      token_ids: all tokens known so far, virtual ones not counted.
      length: most tokens that it may come to, virtual ones counted.
      found: of how many leading tokens the KV need not be computed, at most.
      adapter_from: the first token for which its adapter acts.
      salt: KV is found under this one only.
      tenant, weight, priority: of the request.
    """

    key: int
    model: str
    version: int
    token_ids: tuple[int, ...]
    length: int
    found: int
    adapter_from: int
    salt: str
    tenant: str
    weight: float
    priority: int


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """Agent to home: its KV of the first `found` tokens is here, and there is room for the others."""

    key: int
    found: int


class Close(msgspec.Struct, frozen=True, kw_only=True, tag="close"):
    """Home to agent: nothing more comes. What was computed is the KV of `token_ids`, or if it is poisoned
    nothing that may be found again."""

    key: int
    token_ids: tuple[int, ...]
    poisoned: bool


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag="closed"):
    """Agent to home: what was open is not any more. With a code, name of a gRPC status, opening it again
    would not help."""

    key: int
    code: str = ""
    message: str = ""


class RowItem(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Consecutive tokens of one sequence.

    Attributes:
      key: of its opening.
      span: which of the agent's spans of this chain they enter, or leave.
      start: position of the first.
      q_len: how many.
      chunk: token columns of the grid they are computed on.
    """

    key: int
    span: int
    start: int
    q_len: int
    chunk: int


class Rows(msgspec.Struct, frozen=True, kw_only=True, tag="rows"):
    """Hidden states on their way to a span, or back home: float32 [at least the sum of q_len, width], in the
    order of the items; `back`: they come from a span."""

    width: int
    back: bool = False
    items: tuple[RowItem, ...]

    @property
    def count(self) -> int:
        """How many rows are real."""
        return sum(item.q_len for item in self.items)


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """The agent it is from has forgotten all, and what was on its way from it or to it is lost. Said by what
    joins the agents."""


Message = Open | Opened | Close | Closed | Rows | Gone
