"""What the next step computes: one item a sequence."""

import math
from collections.abc import Callable, Sequence

from jblock.engine.graph.graph import Route
from jblock.engine.scheduling.scheduler import Admission
from jblock.engine.scheduling.sequence import WorkItem, chunk_for


def plan(
    admission: Admission,
    chunks: Sequence[int],
    prompt_seconds: float = math.inf,
    cost: Callable[[Route, int], float | None] = lambda route, chunk: None,
) -> list[WorkItem]:
    """One item for every sequence that has none on its way: the token it decodes, or the next chunk of
    its prompt.

    Decoding goes first. Chunks are begun oldest first, as long as those on their way fit the time for
    them and rows are free; so what is begun ends soon, and a step's tokens have a bound. Where a prompt is
    cut does not depend on any of this.

    Args:
      admission: whose running sequences go on.
      chunks: lengths a prompt may be cut into, ascending.
      prompt_seconds: what chunks may take in one step.
      cost: seconds of one chunk along a route; None if not known.
    """
    items: list[WorkItem] = []
    prefilling = []
    for sequence in list(admission.running.values()):
        if sequence.seq_slot < 0:
            continue  # gave way to an older one a moment ago
        if sequence.item is not None:
            continue
        if sequence.computed < sequence.prefill:
            prefilling.append(sequence)
        elif sequence.sampled < sequence.max_tokens:
            start = sequence.prompt_len + sequence.sampled - 1
            if admission.make_room(sequence, start + 1):
                items.append(WorkItem(sequence, start, 1, 1, [sequence.row], (), True))
                sequence.sampled += 1
    room = prompt_seconds - sum(item.seconds_left for item in admission.passing)
    for sequence in prefilling:
        if sequence.seq_slot < 0:
            continue
        start = sequence.computed
        length, chunk = chunk_for(sequence.prefill - start, tuple(chunks))
        if start >= sequence.prompt_len and sequence.prefill - start == 1:
            # What a swap leaves to compute: the token it was about to decode, on the same grid.
            length = chunk = 1
        if room <= 0 or length - 1 > admission.rows.free:
            break
        seconds = cost(sequence.route, chunk) or 0.0
        room -= seconds
        rows = [sequence.row, *admission.rows.take(length - 1)]
        tokens = sequence.known[start : start + length]
        sequence.computed += length
        samples = sequence.computed == sequence.prefill
        sequence.sampled += samples
        scores = sequence.scores_prompt
        item = WorkItem(sequence, start, length, chunk, rows, tokens, samples, scores)
        item.seconds_left = seconds
        items.append(item)
    return items
