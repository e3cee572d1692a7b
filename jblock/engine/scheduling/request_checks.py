"""What a request may ask for, and what makes one impossible to serve, in words a user can act on.

`RANGES` is used by the server's checks too. Bounds in it that look arbitrary keep every product in float32:
logits of a sound model stay under 1e6, so what they are divided or multiplied by must leave room to 3.4e38
and above 1e-38. Beyond them a program would compute Inf or NaN and pick token 0.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jblock.engine.api import (
    MAX_END_IDS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    POOLINGS,
    Request,
    SamplingParams,
)

if TYPE_CHECKING:
    from jblock.engine.graph.graph import Route
    from jblock.zoo.records import Chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The values of one field.

    Attributes:
      low: the least.
      high: the most.
      above: values are above it, not only at least `low`; None: `low` is the whole rule.
      remedy: which value does what.
      unbounded: users think of it as having no upper bound, so it is named only to who passes it.
    """

    low: float
    high: float
    above: float | None = None
    remedy: str
    unbounded: bool = False

    def problem(self, value: float) -> str:
        """What is wrong with a value, to follow it in a sentence; "" where nothing is."""
        if self.low <= value <= self.high:
            return ""
        least = self.low if self.above is None else self.above
        too_low = not math.isfinite(value) or value < least or value == self.above
        if self.unbounded and isinstance(self.low, float):
            if too_low:
                return f"is not a finite number {'>=' if self.above is None else '>'} {least:g}"
            return f"is below {self.low:g}" if value < self.low else f"is above {self.high:g}"
        if self.unbounded:
            return f"is below {self.low}" if value < self.low else f"is above {self.high}"
        if isinstance(self.low, int):
            return f"is outside {self.low} to {self.high}"
        return f"is outside {'[' if self.above is None else '('}{least:g}, {self.high:g}]"

    @property
    def allowed(self) -> str:
        """The values in words, to follow "give"."""
        if self.above is not None:
            return f"more than {self.above:g} and at most {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


# The smallest positive float32 that arithmetic does not flush to zero is 1.2e-38; a top_p below 1e-9 keeps
# the best token and is computed as that, for no vocabulary has 1e9 tokens.
RANGES: Mapping[str, Range] = {
    "temperature": Range(low=0.0, high=1e30, unbounded=True, remedy="0 is greedy, 1 plain"),
    "top_k": Range(low=0, high=2**63 - 1, unbounded=True, remedy="0 keeps all tokens"),
    "top_p": Range(low=5e-324, high=1.0, above=0.0, remedy="1 keeps all tokens"),
    "min_p": Range(low=0.0, high=1.0, remedy="0 keeps all tokens"),
    "repetition_penalty": Range(
        low=1e-6,
        high=1e6,
        above=0.0,
        unbounded=True,
        remedy="1 does nothing, above it repeats less",
    ),
    "presence_penalty": Range(low=-2.0, high=2.0, remedy="0 does nothing"),
    "frequency_penalty": Range(low=-2.0, high=2.0, remedy="0 does nothing"),
    "top_logprobs": Range(low=0, high=MAX_TOP_LOGPROBS, remedy="ask for fewer"),
}
LOGIT_BIAS = Range(low=-100.0, high=100.0, remedy="-100 forbids a token")


def first_problem(sampling: SamplingParams) -> tuple[str, Range] | None:
    """The first field that is out of its range, and what it may be; None: all are in
    theirs."""
    for field, allowed in RANGES.items():
        if allowed.problem(getattr(sampling, field)):
            return field, allowed
    return None


def route_problem(request: Request, routes: Mapping[str, "Route"]) -> tuple[str, str] | None:
    """Why a request has no route: the name of a gRPC status, and words. None: it has one."""
    route = routes.get(request.model)
    if route is None:
        names = sorted(routes)
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return "NOT_FOUND", f"model {request.model!r} is not served; served: {known}"
    if request.version not in (0, route.chain.version):
        words = (
            f"model {request.model!r} is served in version {route.chain.version} by now, not "
            f"{request.version}; send the request again"
        )
        return "ABORTED", words
    return None


def not_finite(chain: "Chain") -> str:
    """Why a request ended for which no token could be picked."""
    return (
        f"model {chain.name!r} version {chain.version} computed NaN or Inf for this request; check its "
        "weights with `jblock convert fsck`, other models go on"
    )


def no_memory(error: Exception) -> str:
    """Why a request ended that ran alone."""
    return (
        "the device has no memory for a step of this request alone: shorten the prompt, or start the server "
        f"with less kv_memory_mb ({error})"
    )


def request_problem(request: Request, chain: "Chain", limit: int, remedy: str) -> str:
    """Field, value and remedy of the first thing that makes a request impossible to serve, or "".

    Args:
      request: as submitted.
      chain: that is to serve it.
      limit: most tokens of prompt and output together.
      remedy: against a prompt longer than that.
    """
    count, vocab = len(request.token_ids), chain.vocab_size
    if count == 0:
        return "token_ids is empty; give at least one token"
    if count >= limit:
        return (
            f"token_ids has {count} tokens; model {request.model!r} takes at most {limit - 1} "
            f"and one to generate: {remedy}"
        )
    for field in ("token_ids", "generated"):
        wrong = next((t for t in getattr(request, field) if not 0 <= t < vocab), None)
        if wrong is not None:
            return f"{field} has {wrong}; ids of {request.model!r} go from 0 to {vocab - 1}"
    if request.pooling not in ("", *POOLINGS):
        return f"pooling is {request.pooling!r}; give one of {', '.join(POOLINGS)}"
    if request.sampling.grammar and chain.tokenizer is None:
        return f"grammar needs a tokenizer, which {request.model!r} has not; leave it out"
    return sampling_problem(request.sampling, chain)


def sampling_problem(sampling: SamplingParams, chain: "Chain") -> str:
    """Field, value and remedy of the first thing that is out of its range (`RANGES`) or more
    than the programs hold, or ""."""
    if sampling.max_tokens < 1:
        return f"max_tokens is {sampling.max_tokens}; give at least 1"
    if wrong := first_problem(sampling):
        field, allowed = wrong
        return f"{field} is {getattr(sampling, field)}; give {allowed.allowed}: {allowed.remedy}"
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        return f"logit_bias has {len(sampling.logit_bias)} ids; give at most {MAX_LOGIT_BIAS}"
    for token, value in sampling.logit_bias:
        if not 0 <= token < chain.vocab_size or LOGIT_BIAS.problem(value):
            return (
                f"logit_bias has {value} for the id {token}; give values of {LOGIT_BIAS.allowed} for ids "
                f"from 0 to {chain.vocab_size - 1}"
            )
    ends = len(sampling.stop_token_ids) + len(chain.eos_token_ids)
    if sampling.min_tokens > 0 and ends > MAX_END_IDS:
        return (
            f"min_tokens is {sampling.min_tokens} with {ends} stop and eos ids; give at most "
            f"{MAX_END_IDS} of them, or min_tokens 0"
        )
    return ""
