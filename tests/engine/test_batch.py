"""Chunks and buckets: pure functions of what they are given."""

import types

from hypothesis import given
from hypothesis import strategies as st

from jblock.engine.config import Bucket
from jblock.engine.runner.batch import batches
from jblock.engine.scheduling.sequence import WorkItem, chunk_for

CHUNKS = (16, 64, 256)
BUCKETS = [Bucket(n, q) for n, q in ((1, 1), (4, 1), (16, 1), (1, 16), (4, 16), (1, 64), (1, 256))]


@given(st.integers(1, 5000))
def test_chunks_cover_the_prompt(length):
    left, steps = length, 0
    while left:
        tokens, chunk = chunk_for(left, CHUNKS)
        assert 1 <= tokens <= chunk and chunk in CHUNKS
        assert 2 * tokens >= chunk or chunk == CHUNKS[0]
        left, steps = left - tokens, steps + 1
    assert steps <= length // CHUNKS[-1] + 8


def with_slot(slot):
    """What stands for a sequence whose adapter has a slot."""
    return types.SimpleNamespace(adapter_slot=slot, adapter_from=0, seq_slot=0)


@given(st.lists(st.sampled_from((1, 16, 64, 256)), max_size=60))
def test_batches_hold_every_item_once(chunks):
    items = [
        WorkItem(with_slot(i % 3), 0, 1, chunk, [0], (), True) for i, chunk in enumerate(chunks)
    ]
    out = list(batches(items, BUCKETS))
    assert sorted(id(i) for b in out for i in b.items) == sorted(map(id, items))
    for batch in out:
        assert batch.bucket in BUCKETS
        assert all(i.chunk == batch.bucket.q_len for i in batch.items)
        assert len(batch.items) <= batch.bucket.num_seqs
        slots = [i.sequence.adapter_slot for i in batch.items]
        assert slots == sorted(slots), "those of one adapter lie together"
    assert [b.bucket.q_len for b in out] == sorted(b.bucket.q_len for b in out)
