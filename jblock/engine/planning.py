"""What the next step computes: one item a sequence."""

from collections.abc import Sequence

from jblock.engine.admission import Admission
from jblock.engine.sequence import Item, chunk_for


def plan(admission: Admission, chunks: Sequence[int]) -> list[Item]:
    """One item a sequence: the token it decodes, or the next chunk of its prompt if rows allow.

    Decoding goes first; prompts take the rows that are left, oldest first.

    Args:
      admission: whose running sequences go on.
      chunks: lengths a prompt may be cut into, ascending.
    """
    items: list[Item] = []
    prefilling = []
    for sequence in list(admission.running.values()):
        if sequence.seq_slot < 0:
            continue  # gave way to an older one a moment ago
        if sequence.computed < sequence.prefill:
            prefilling.append(sequence)
        elif sequence.sampled < sequence.max_tokens:
            start = sequence.prompt_len + sequence.sampled - 1
            if admission.make_room(sequence, start + 1):
                items.append(Item(sequence, start, 1, 1, [sequence.row], (), True))
                sequence.sampled += 1
    for sequence in prefilling:
        if sequence.seq_slot < 0:
            continue
        start = sequence.computed
        length, chunk = chunk_for(sequence.prefill - start, tuple(chunks))
        if start >= sequence.prompt_len and sequence.prefill - start == 1:
            # What a swap leaves to compute: the token it was about to decode, on the same grid.
            length = chunk = 1
        if length - 1 > admission.rows.free:
            break
        rows = [sequence.row, *admission.rows.take(length - 1)]
        tokens = sequence.known[start : start + length]
        sequence.computed += length
        admission.kv.remember(sequence, sequence.computed)
        samples = sequence.computed == sequence.prefill
        sequence.sampled += samples
        scores = sequence.scores_prompt
        items.append(Item(sequence, start, length, chunk, rows, tokens, samples, scores))
    return items
