"""The allocator: every id has at most one owner, and nothing is lost."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jblock.engine.kv_cache.page_pool import IdAllocator, OutOfPages

COUNT, FIRST = 12, 1


class AllocatorMachine(RuleBasedStateMachine):
    """Random takes and gives against a set of who holds what."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.allocator = IdAllocator(COUNT, FIRST)
        self.held: list[int] = []

    @rule(target=leases, count=st.integers(0, COUNT + 2))
    def take(self, count):
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(OutOfPages):
                self.allocator.allocate(count)
            assert self.allocator.num_free == free
            return []
        ids = self.allocator.allocate(count)
        assert len(ids) == count
        self.held.extend(ids)
        return ids

    @rule(ids=consumes(leases))
    def give(self, ids):
        self.allocator.free(ids)
        for i in ids:
            self.held.remove(i)

    @rule(i=st.integers(-1, COUNT + 3))
    def give_wrongly(self, i):
        if i not in self.held:
            with pytest.raises(ValueError):
                self.allocator.free([i])

    @rule(ids=leases)
    def give_twice(self, ids):
        if ids:
            with pytest.raises(ValueError):
                self.allocator.free([*ids, ids[0]])

    @invariant()
    def accounts_balance(self):
        assert len(set(self.held)) == len(self.held)
        assert all(FIRST <= i < FIRST + COUNT for i in self.held)
        assert self.allocator.num_free + len(self.held) == self.allocator.total == COUNT


TestAllocator = AllocatorMachine.TestCase


def test_rejects_a_negative_count():
    with pytest.raises(ValueError, match="-1"):
        IdAllocator(-1)
