"""The partition: blocks cover every chain, and cut exactly where sharing begins or ends."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from jblock.zoo.partition import Block, Cost, plan_blocks
from jblock.zoo.records import Chain, Step


def chain(*components, deltas=()):
    return Chain(
        name="x",
        family="llama",
        steps=tuple(
            Step(component=c, deltas=("d",) if i in deltas else ())
            for i, c in enumerate(components)
        ),
        tokenizer=None,
        max_position=1,
        vocab_size=1,
    )


def planned(chains):
    return plan_blocks(chains).blocks


def cut(chains):
    return {key: [b.components for b in run] for key, run in plan_blocks(chains).blocks.items()}


def test_one_chain_is_embedding_body_and_head():
    assert cut({"a": chain("e", "0", "1", "2", "3", "n", "u")}) == {
        "a": [("e",), ("0", "1", "2", "3"), ("n", "u")]
    }


def test_a_fine_tune_of_the_last_layers_cuts_once():
    assert cut(
        {
            "base": chain("e", "0", "1", "2", "3", "n", "u"),
            "tuned": chain("e", "0", "1", "x", "y", "n", "u"),
        }
    ) == {
        "base": [("e",), ("0", "1"), ("2", "3"), ("n", "u")],
        "tuned": [("e",), ("0", "1"), ("x", "y"), ("n", "u")],
    }


def test_chains_part_and_meet_again():
    got = planned(
        {
            "a": chain("e", "0", "1", "2", "n", "u"),
            "b": chain("e", "0", "x", "2", "n", "v"),
        }
    )
    assert got["b"] == (
        Block(components=("e",), first=0),
        Block(components=("0",), first=1),
        Block(components=("x",), first=2),
        Block(components=("2",), first=3),
        Block(components=("n", "v"), first=4),
    )


def test_deltas_do_not_cut():
    plain, adapted = chain("e", "0", "1", "n", "u"), chain("e", "0", "1", "n", "u", deltas=(1,))
    assert cut({"a": plain, "b": adapted})["b"] == [("e",), ("0", "1"), ("n", "u")]


def test_a_component_used_twice_is_a_block_of_its_own():
    assert cut({"a": chain("e", "0", "0", "1", "n", "u")})["a"] == [
        ("e",),
        ("0",),
        ("0",),
        ("1",),
        ("n", "u"),
    ]


bodies = st.lists(st.sampled_from("01234567"), max_size=8)


@given(st.dictionaries(st.sampled_from("abcd"), bodies, max_size=4))
def test_invariants(layers):
    chains = {key: chain("e", *body, "n", f"u{key}") for key, body in layers.items()}
    partition = plan_blocks(chains).blocks
    holders: dict[str, set[tuple[str, ...]]] = {}
    for key, run in partition.items():
        flat = [c for block in run for c in block.components]
        assert flat == [s.component for s in chains[key].steps]
        assert [b.first for b in run] == [
            sum(len(b.components) for b in run[:i]) for i in range(len(run))
        ]
        assert (run[0].components, run[-1].components) == (("e",), ("n", f"u{key}"))
        for block in run[1:-1]:
            for component in block.components:
                holders.setdefault(component, set()).add(block.components)
    # A component is in one block only, whichever chain it is looked at from.
    assert all(len(found) == 1 for found in holders.values())
    # No two neighbors could be joined without losing that.
    for run in partition.values():
        for left, right in itertools.pairwise(run[1:-1]):
            pair = left.components + right.components
            together = [
                "".join(body).count("".join(pair)) == "".join(body).count("".join(part))
                for body in layers.values()
                for part in (left.components, right.components)
            ]
            assert not all(together) or left == right


def costing(chains, cost):
    return {
        key: [b.components for b in run] for key, run in plan_blocks(chains, cost).blocks.items()
    }


def sized(hop_seconds, **nbytes):
    return Cost(
        hop_seconds=hop_seconds,
        bytes_per_second=1e9,
        nbytes={c: 10**6 for c in "012345xyzw"} | nbytes,
    )


def test_a_run_is_shared_only_where_that_saves_more_than_its_cuts_cost():
    chains = {
        "a": chain("e", "0", "1", "2", "n", "u"),
        "b": chain("e", "x", "1", "y", "n", "u"),
    }
    apart = {key: [b.components for b in run] for key, run in plan_blocks(chains).blocks.items()}
    # Sharing 1 saves one reading of 1 MB, a millisecond; it takes two hand-overs more in each chain.
    assert costing(chains, sized(0.2e-3)) == apart
    assert costing(chains, sized(0.3e-3)) == {
        "a": [("e",), ("0", "1", "2"), ("n", "u")],
        "b": [("e",), ("x", "1", "y"), ("n", "u")],
    }
    # The head and the embedding stay blocks of their own, however small.
    assert costing(chains, sized(1.0))["a"][0] == ("e",)


def test_a_large_run_stays_shared_beside_a_small_one():
    chains = {
        "a": chain("e", "0", "1", "2", "3", "4", "n", "u"),
        "b": chain("e", "0", "1", "x", "3", "y", "n", "u"),
    }
    got = costing(chains, sized(0.3e-3, **{"0": 10**8}))
    assert got["a"] == [("e",), ("0", "1"), ("2", "3", "4"), ("n", "u")]
    assert got["b"] == [("e",), ("0", "1"), ("x", "3", "y"), ("n", "u")]


def test_more_users_make_sharing_worth_its_cuts():
    many = {k: chain("e", f"{k}0", "1", f"{k}2", "n", "u") for k in "abcdefgh"}
    nbytes = {f"{k}{i}": 10**6 for k in many for i in (0, 2)}
    two = {k: many[k] for k in "ab"}
    cost = sized(0.4e-3, **nbytes)
    assert ("1",) not in costing(two, cost)["a"]  # 1 ms saved, 4 hand-overs
    assert ("1",) in costing(many, sized(0.05e-3, **nbytes))["a"]


@given(st.lists(bodies, min_size=1, max_size=5), st.floats(1e-6, 1.0))
def test_with_any_cost_blocks_cover_every_chain(layers, hop):
    chains = {str(i): chain("e", *body, "n", "u") for i, body in enumerate(layers)}
    cut = plan_blocks(chains, sized(hop, **{"6": 10, "7": 10**9})).blocks
    for key, run in cut.items():
        ids = [s.component for s in chains[key].steps]
        assert [c for b in run for c in b.components] == ids
        assert [b.first for b in run] == [
            sum(len(b.components) for b in run[:i]) for i in range(len(run))
        ]
        assert len(run) <= len(plan_blocks(chains).blocks[key])


def test_a_plan_says_who_uses_a_block_and_whose_cut_changed():
    alone = {"base": chain("e", "0", "1", "n", "u")}
    both = alone | {"tuned": chain("e", "0", "x", "n", "u")}
    before, after = plan_blocks(alone), plan_blocks(both)
    assert after.users[("0",)] == ("base", "tuned") and after.users[("x",)] == ("tuned",)
    assert after.recut(before) == ["base"] and before.recut(before) == []
