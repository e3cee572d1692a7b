"""The machine as the scheduler sees it: what it can run now, and what that takes."""

import dataclasses
from collections.abc import Callable, Sequence

from jblock.engine.graph.graph import Route
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.sequence_pages import Boundary
from jblock.engine.scheduling.sequence import chunk_for

# What a token is charged where nothing is measured.
_TOKEN_SECONDS = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the scheduler has to know of the device now.

    Attributes:
      greedy_only: other requests wait for programs.
      rates: of copies and prefill; None: not measured, nothing is offloaded.
      chunks: lengths a prompt may be cut into, ascending.
      chunk_seconds: of one chunk of a length along a route, from a boundary of it or from the embedding; None
        if not known.
      token_seconds: of one decoded token along a route, its part of a batch of a good size, or None.
    """

    greedy_only: bool
    rates: Rates | None
    chunks: Sequence[int]
    chunk_seconds: Callable[[Route, int, Boundary | None], float | None]
    token_seconds: Callable[[Route], float | None]

    def prompt_seconds(self, route: Route, num_tokens: int) -> float:
        """What computing so many tokens takes, chunk by chunk."""
        seconds = 0.0
        while num_tokens > 0:
            length, chunk = chunk_for(num_tokens, tuple(self.chunks))
            known = self.chunk_seconds(route, chunk, None)
            seconds += length * _TOKEN_SECONDS if known is None else known
            num_tokens -= length
        return seconds

    def decode_seconds(self, route: Route) -> float:
        """What one decoded token takes."""
        known = self.token_seconds(route)
        return _TOKEN_SECONDS if known is None else known
