"""What makes a request impossible to serve, in words a user can act on."""

import math

from jblock.engine.api import (
    MAX_END_IDS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    Request,
    SamplingParams,
)
from jblock.zoo.records import Chain


def request_problem(request: Request, chain: Chain, limit: int, remedy: str) -> str:
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
    return sampling_problem(request.sampling, chain)


def sampling_problem(sampling: SamplingParams, chain: Chain) -> str:
    """Field, value and remedy of the first thing this engine cannot do, or "".

    Only what would break a program is refused; narrower bounds are the front end's.
    """
    if sampling.max_tokens < 1:
        return f"max_tokens is {sampling.max_tokens}; give at least 1"
    if not sampling.repetition_penalty > 0:
        return f"repetition_penalty is {sampling.repetition_penalty}; give more than 0, 1 for none"
    for field in ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        value = getattr(sampling, field)
        if not math.isfinite(value):
            return f"{field} is {value}; give a finite number"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p is {sampling.min_p}; give 0 to 1, 0 for none"
    if not 0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS:
        return f"top_logprobs is {sampling.top_logprobs}; give 0 to {MAX_TOP_LOGPROBS}"
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        return f"logit_bias has {len(sampling.logit_bias)} ids; give at most {MAX_LOGIT_BIAS}"
    for token, value in sampling.logit_bias:
        if not 0 <= token < chain.vocab_size or not math.isfinite(value):
            return (
                f"logit_bias has {value} for the id {token}; give finite values for ids from 0 to "
                f"{chain.vocab_size - 1}"
            )
    ends = len(sampling.stop_token_ids) + len(chain.eos_token_ids)
    if sampling.min_tokens > 0 and ends > MAX_END_IDS:
        return (
            f"min_tokens is {sampling.min_tokens} with {ends} stop and eos ids; give at most "
            f"{MAX_END_IDS} of them, or min_tokens 0"
        )
    return ""
