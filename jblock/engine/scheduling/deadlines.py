"""Deadlines: work that cannot be done in time is not begun."""

import time

from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.scheduling.machine import Machine
from jblock.engine.scheduling.sequence import SequenceState


def set_deadline(sequence: SequenceState, machine: Machine, kv: KVCacheManager) -> None:
    """Says when a sequence that came now must be complete, and when it must have started for that."""
    given = sequence.request.deadline
    if given is not None:
        sequence.deadline = time.monotonic() + given
        sequence.latest_start = sequence.deadline - least_seconds(sequence, machine, kv)


def least_seconds(sequence: SequenceState, machine: Machine, kv: KVCacheManager) -> float:
    """What a waiting sequence takes if nothing else runs: the part of its prompt that is not cached, and as
    many tokens as it must generate. 0 where nothing is measured."""
    route, sampling = sequence.route, sequence.request.sampling
    token_seconds = machine.token_seconds(route)
    if token_seconds is None:
        return 0.0
    tokens, limit = sequence.all_token_ids, sequence.shareable_tokens
    cached = kv.cached_tokens(sequence.pages, tokens, limit)
    must = sequence.max_tokens if sampling.ignore_eos and not sampling.stop_token_ids else 0
    decoded = max(max(must, sampling.min_tokens) - len(sequence.generated) - 1, 0)
    return machine.prompt_seconds(route, len(tokens) - cached) + decoded * token_seconds


def deadline_problem(sequence: SequenceState) -> str:
    """Why a waiting sequence was refused, in words for who sent it."""
    needs = sequence.deadline - sequence.latest_start
    return (
        f"deadline: {sequence.request.deadline:.3g} s were given, and this request takes at least "
        f"{needs:.3g} s from when it starts; give it more time, or ask for less"
    )
