"""Edges: what is measured of substitutes is kept, checked, carried, and used only as the operator allows."""

import dataclasses
import json
import math
import threading

import pytest
import zoos
from hypothesis import given
from hypothesis import strategies as st

from jblock.zoo import edges, gc
from jblock.zoo.acceptance import AcceptancePolicy, needed, violations
from jblock.zoo.edge_records import MEASURES, Edge, Probe, Score, versions
from jblock.zoo.fsck import fsck
from jblock.zoo.records import Chain, NotFoundError, Step, ZooError
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo
from jblock.zoo.transfer import copy

PROBE = Probe(name="held-out text", digest="a" * 64, tokens=100)


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    zoos.fill(zoo, name="n", seed=1)
    return zoo


def make(zoo, **change):
    """An edge from the ffn of n, with its delta, to that of m."""
    fields = dict(
        kind="equivalent",
        original=(zoo.chain("m").steps[1],),
        substitute=(zoo.chain("n").steps[1],),
        scores={
            "parameter_cosine": Score(value=0.999),
            "kl": Score(value=0.01, low=0.005, high=0.02, count=99),
            "top1_agreement": Score(value=0.98, low=0.97, high=0.99, count=99),
        },
        chain="m@1",
        probe=PROBE,
        provenance={"command": "equivalence", "seed": 3},
        versions=versions(),
    )
    return Edge(**fields | change)


def test_what_is_put_comes_back_and_keeps_what_it_names(zoo):
    (id_,) = edges.put_edges(zoo, make(zoo))
    assert edges.edges(zoo) == [make(zoo)]
    assert edges.edge(zoo, id_).id == id_ == edges.find_edge(zoo, id_[:9])
    assert fsck(zoo) == []
    gc.remove(zoo, "n")
    kept = {zoo.chain("m").steps[1].component, make_side(zoo)[0]}
    gone = {g.id for g in gc.collect(zoo, dry_run=False)}
    assert gone and not gone & kept
    assert fsck(zoo) == []
    with pytest.raises(ZooError, match="names m@1"):
        gc.remove(zoo, "m")
    edges.remove_edge(zoo, id_)
    assert len(gc.collect(zoo, dry_run=False)) == 2  # the ffn of n and its delta
    gc.remove(zoo, "m")


def make_side(zoo):
    (edge,) = edges.edges(zoo)
    return [i for s in edge.substitute for i in (s.component, *s.deltas)]


def test_measuring_again_replaces(zoo):
    edges.put_edges(zoo, make(zoo))
    better = make(zoo, scores={"kl": Score(value=0.001)})
    edges.put_edges(zoo, better)
    assert edges.edges(zoo) == [better]
    edges.put_edges(zoo, better)
    other = make(zoo, probe=dataclasses.replace(PROBE, digest="b" * 64))
    edges.put_edges(zoo, other, make(zoo, kind="surrogate"))
    assert len(edges.edges(zoo)) == 3


def test_two_writers_lose_nothing(zoo):
    found = [make(zoo, provenance={"seed": i}, chain=f"{'mn'[i % 2]}@1") for i in range(8)]
    found = [dataclasses.replace(e, probe=probe(i)) for i, e in enumerate(found)]
    threads = [threading.Thread(target=edges.put_edges, args=(zoo, e)) for e in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {e.id for e in edges.edges(zoo)} == {e.id for e in found}


def probe(i):
    return Probe(name="p", digest=f"{i:064x}", tokens=1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="same"), "kind 'same'"),
        (dict(substitute=()), "need a step"),
        (dict(substitute=(Step(component="xyz"),)), "is no id"),
        (dict(scores={"niceness": Score(value=1.0)}), "measure 'niceness'"),
        (dict(scores={"kl": Score(value=math.nan)}), "finite"),
        (dict(scores={"kl": Score(value=1.0, low=2.0, high=3.0)}), "outside its interval"),
        (dict(chain=None), "need the chain"),
        (dict(probe=None), "need the chain and the probe"),
        (dict(chain="m"), "NAME@VERSION"),
    ],
)
def test_what_says_nothing_is_refused(zoo, change, message):
    with pytest.raises(ZooError, match=message):
        make(zoo, **change)


@pytest.mark.parametrize(
    "change",
    [
        dict(substitute=(Step(component="0" * 64),)),
        dict(substitute=(Step(component="0" * 64, deltas=("1" * 64,)),)),
        dict(chain="m@2"),
        dict(chain="nobody@1"),
    ],
)
def test_an_edge_to_nowhere_is_refused(zoo, change):
    with pytest.raises(NotFoundError):
        edges.put_edges(zoo, make(zoo), make(zoo, **change))
    assert edges.edges(zoo) == []


def test_a_delta_of_another_component_is_refused(zoo):
    mixed = Step(component=zoo.chain("m").steps[1].component, deltas=zoo.chain("n").steps[1].deltas)
    with pytest.raises(ZooError, match="another component"):
        edges.put_edges(zoo, make(zoo, substitute=(mixed,)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace("0.01", "0.0")),
        lambda path: path.write_text(path.read_text().replace('"kind"', '"chain"')),
        lambda path: path.write_text(path.read_text().replace('"low":0.005', '"low":"x"')),
        lambda path: path.write_text(path.read_text().replace('"count":99', '"count":"9"')),
        lambda path: path.write_text(path.read_text().replace('"low":0.005', f'"low":{"9" * 400}')),
        lambda path: path.rename(path.with_name("0" * 64 + ".json")),
        lambda path: (path.parent / "stray").write_text(""),
    ],
)
def test_damage_is_found(zoo, damage):
    (id_,) = edges.put_edges(zoo, make(zoo))
    damage(zoo.path / "edges" / f"{id_}.json")
    assert len(fsck(zoo)) == 1


def test_repair_sets_a_damaged_edge_aside(zoo):
    (id_,) = edges.put_edges(zoo, make(zoo))
    (zoo.path / "edges" / f"{id_}.json").write_text("{}")
    (done,) = repair(zoo)
    assert id_ in done
    assert fsck(zoo) == [] and edges.edges(zoo) == []
    edges.put_edges(zoo, make(zoo))


def test_copy_carries_what_fits(zoo, tmp_path):
    edges.put_edges(zoo, make(zoo))
    target = Zoo.create(tmp_path / "other")
    zoos.fill(target, name="m", seed=5)
    copy(zoo, target, "m")
    assert edges.edges(target) == []
    copy(zoo, target, "n")
    (edge,) = edges.edges(target)
    assert edge == make(zoo, chain="m@2")  # the same model is another version there
    assert fsck(target) == []
    copy(zoo, target, "n")
    assert edges.edges(target) == [edge]


def test_nothing_is_usable_by_default_or_by_parameters_alone(zoo):
    edge = make(zoo)
    assert violations(edge, AcceptancePolicy())
    assert violations(edge, AcceptancePolicy(policy="adaptive"))
    alone = AcceptancePolicy(policy="near", thresholds={"parameter_cosine": 0.9})
    assert "no threshold that licenses" in violations(edge, alone)[0]
    both = AcceptancePolicy(policy="near", thresholds={"parameter_cosine": 0.9, "kl": 0.02})
    assert violations(edge, both) == []
    by_parameters = make(zoo, scores={"parameter_cosine": Score(value=1.0)})
    assert violations(by_parameters, both) == ["kl was not measured"]
    # Nor by what can get better while a fine-tune is erased.
    better = make(
        zoo, scores={"perplexity_change": Score(value=-0.5, low=-0.6, high=-0.4, count=9)}
    )
    for bound in (0.01, 0.9):
        text = AcceptancePolicy(policy="near", thresholds={"perplexity_change": bound})
        assert "set one on kl or accuracy_change" in violations(better, text)[0]
    small = AcceptancePolicy(policy="near", thresholds={"perplexity_change": 0.01})
    assert "the size of perplexity_change may be 0.6, over 0.01" in violations(better, small)[1]
    stitch = make(zoo, kind="stitch")
    assert "needs policy adaptive" in violations(stitch, both)[0]
    assert violations(stitch, dataclasses.replace(both, policy="adaptive")) == []
    for bad in (
        dict(policy="most"),
        dict(thresholds={"x": 1.0}),
        dict(thresholds={"kl": math.inf}),
    ):
        with pytest.raises(ZooError):
            AcceptancePolicy(**bad)


@given(
    measure=st.sampled_from([n for n, m in MEASURES.items() if m.output]),
    value=st.floats(-1, 1),
    width=st.floats(0, 0.5),
    bound=st.floats(-1, 1),
)
def test_the_worse_end_decides(measure, value, width, bound):
    step = (Step(component="0" * 64),)
    score = Score(value=value, low=value - width, high=value + width, count=9)
    edge = Edge(
        kind="equivalent",
        original=step,
        substitute=step,
        scores={measure: score},
        chain="m@1",
        probe=PROBE,
    )
    reasons = violations(edge, AcceptancePolicy(policy="near", thresholds={measure: bound}))
    met = not [r for r in reasons if measure in r and "license" not in r]
    assert bool(reasons) == (not met or not MEASURES[measure].licenses)
    if MEASURES[measure].two_sided:
        assert met == (max(abs(value - width), abs(value + width)) <= abs(bound))
    elif MEASURES[measure].better == "higher":
        assert met == (value - width >= bound)
    else:
        assert met == (value + width <= bound)
    assert Edge.from_json(json.loads(json.dumps(edge.to_json()))).id == edge.id


@pytest.mark.parametrize("value", [0.0, -5e-324, -1e-286, -1e-12])
def test_no_count_decides_what_lies_at_the_threshold(value):
    score = Score(value=value, low=value - 0.5, high=value + 0.5, count=9)
    assert needed("hidden_error", score, 0.0) is None
    score = Score(value=-0.25, low=-0.75, high=0.25, count=9)
    assert needed("hidden_error", score, 0.0) == 36


def test_what_cannot_decide_says_how_many_would(zoo):
    """The interval of 400 items is a point wide; half as wide decides half a point of room."""
    score = Score(value=-0.005, low=-0.015, high=0.005, count=400)
    edge = make(zoo, scores={"accuracy_change": score})
    strict = AcceptancePolicy(policy="near", thresholds={"accuracy_change": -0.010})
    assert "400 items cannot decide it, about 1,600 would" in violations(edge, strict)[0]
    # Whichever sign it is given with; and where the value itself is too bad, no number helps.
    same = AcceptancePolicy(policy="near", thresholds={"accuracy_change": 0.010})
    assert violations(edge, same) == violations(edge, strict)
    hopeless = AcceptancePolicy(policy="near", thresholds={"accuracy_change": 0.004})
    assert "cannot decide" not in violations(edge, hopeless)[0]
    wide = AcceptancePolicy(policy="near", thresholds={"accuracy_change": 0.02})
    assert violations(edge, wide) == []


def test_a_chain_without_a_policy_is_exact_and_keeps_its_version(zoo):
    path = zoo.path / "chains" / "m" / "1.json"
    data = json.loads(path.read_text())
    assert data.pop("policy") == "exact"
    path.write_text(json.dumps(data))
    zoos.forget_records(zoo, "m")  # such records are older than their hashes
    assert zoo.chain("m").policy == "exact"
    assert zoo.publish(zoo.chain("m")).version == 1
    near = Chain.from_json(data | {"policy": "near", "version": 0})
    assert zoo.publish(near).version == 2
    with pytest.raises(ZooError, match="policy"):
        Chain.from_json(data | {"policy": "any"})
