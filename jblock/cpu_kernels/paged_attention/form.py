"""The forms of attention there is machine code for; see `kernel`."""

import dataclasses
import math
import struct
from collections.abc import Sequence

from jblock.cpu_kernels import targets

TILE_ROWS = 64
"""Rows (tokens x heads of a KV head) that pass over the pages together."""

MASKED = -1e30
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Of a value in the pages, by their dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """All that the machine code depends on.

    Attributes:
      kv: dtype of the pages, one of float32, bfloat16, int8.
      d: width of a head, a multiple of 4.
      groups: query heads of a KV head.
      page: tokens of a page, a multiple of 4.
      grid: whether rows are the engine's grid, so many for every sequence.
      rows: of queries that are multiplied with a K or V vector while it is in a register.
      window: tokens visible to a query; 0 all.
      softcap: of the scores; 0 none.
      scale: of the scores.
    """

    kv: str
    d: int
    groups: int
    page: int
    grid: bool
    rows: int
    window: int
    softcap: float
    scale: float

    @property
    def token_width(self) -> int:
        """Tokens of a vector."""
        return math.gcd(self.page, targets.vector_width())

    @property
    def head_width(self) -> int:
        """Of d, in a vector."""
        return math.gcd(self.d, targets.vector_width())

    @property
    def fields(self) -> tuple[str, ...]:
        """As they stand in a target's name."""
        floats = (struct.pack(">f", x).hex() for x in (self.softcap, self.scale))
        ints = (self.d, self.groups, self.page, int(self.grid), self.rows, self.window)
        return (self.kv, *map(str, ints), *floats)

    @classmethod
    def parse(cls, fields: Sequence[str]) -> "Form":
        """The inverse of `fields`."""
        kv, d, groups, page, grid, rows, window, softcap, scale = fields
        unpack = lambda x: struct.unpack(">f", bytes.fromhex(x))[0]
        return cls(
            kv=kv,
            d=int(d),
            groups=int(groups),
            page=int(page),
            grid=bool(int(grid)),
            rows=int(rows),
            window=int(window),
            softcap=unpack(softcap),
            scale=unpack(scale),
        )


def rows_at_once(groups: int, max_q_len: int) -> int:
    """Form.rows for sequences of up to max_q_len new tokens: at most 6, which leaves registers for four
    vectors of K or V each, and no more idle ones than needed."""
    rows = min(max_q_len * groups, TILE_ROWS)
    most = 6 if targets.accumulators() >= 24 else 3
    return -(-rows // -(-rows // most))
