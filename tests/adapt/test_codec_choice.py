"""Which codec each component gets: within the budget, and never a worse use of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.adapt.compression import Option, choose
from jblock.zoo.records import ZooError

options = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=6).map(
    lambda pairs: [Option(str(p), p[0], p[1] / 1000) for p in pairs]
)


@settings(max_examples=100, deadline=None)
@given(
    of=st.dictionaries(st.integers(0, 9), options, min_size=1, max_size=5),
    budget=st.integers(0, 260),
)
def test_the_choice_keeps_to_the_budget(of, budget):
    least = sum(min(o.nbytes for o in own) for own in of.values())
    if least > budget:
        with pytest.raises(ZooError, match=f"take {least} bytes, the budget allows {budget}"):
            choose(of, budget)
        return
    chosen = choose(of, budget)
    assert chosen.keys() == of.keys()
    assert all(chosen[i] in of[i] for i in of)
    spent = sum(o.nbytes for o in chosen.values())
    assert spent <= budget
    # With more to spend the error is never larger; with all there is, it is the least there is.
    error = sum(o.error for o in chosen.values())
    everything = choose(of, sum(max(o.nbytes for o in own) for own in of.values()))
    assert sum(o.error for o in everything.values()) == pytest.approx(
        sum(min(o.error for o in own) for own in of.values())
    )
    assert sum(o.error for o in everything.values()) <= error + 1e-9


def test_what_buys_most_goes_first():
    one = [Option("a", 10, 1.0), Option("b", 20, 0.1)]
    two = [Option("a", 10, 1.0), Option("b", 20, 0.9)]
    chosen = choose({0: one, 1: two}, 30)
    assert (chosen[0].label, chosen[1].label) == ("b", "a")
