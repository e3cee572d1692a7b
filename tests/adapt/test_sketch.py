"""Search: what is alike is found, by samples, and compared in full once."""

import numpy as np
import pytest
import zoos
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.adapt import metrics, sketch, substitution
from jblock.blocks.spec import FfnSpec
from jblock.zoo.edge_records import Score
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

SPEC = FfnSpec(hidden_size=64, intermediate_size=192, norm_eps=1e-5)


def near(tensors, cosine, seed):
    """Tensors whose differences from `tensors` make this cosine."""
    rng = np.random.default_rng(seed)
    angle = np.tan(np.arccos(cosine))
    out = {}
    for name, value in tensors.items():
        noise = rng.standard_normal(value.shape)
        size = np.linalg.norm(value) / np.linalg.norm(noise)
        out[name] = (value + angle * size * noise).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Forty unlike components, and ten like one of those."""
    zoo = Zoo.create(tmp_path_factory.mktemp("search") / "zoo")
    with zoo.writer() as writer:
        bases = [writer.put_component(SPEC, zoos.tensors(SPEC, seed)) for seed in range(40)]
        tuned = {}
        for i in range(10):
            tensors = near(zoos.tensors(SPEC, i), 0.99 - 0.008 * i, 100 + i)
            tuned[writer.put_component(SPEC, tensors)] = bases[i]
    return zoo, bases, tuned


def test_the_alike_are_found_and_only_they(zoo):
    zoo, bases, tuned = zoo
    used = {i: {"a", "b"} for i in bases} | {i: {"c"} for i in tuned}
    read = []
    found = substitution.search(zoo, used, 0.9, read.append)
    assert found.components == 50 and found.alike >= 10
    assert {c.original: c.substitute for c in found.candidates} == tuned
    assert len(read) == 10  # compared in full: one pair each
    for candidate in found.candidates:
        a, b = (zoo.load_component(i) for i in (candidate.original, candidate.substitute))
        x, y = (np.concatenate([t[n].reshape(-1) for n in sorted(t)]) for t in (a, b))
        expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert candidate.cosine == pytest.approx(expected, abs=1e-5)
        assert candidate.cosines.keys() == SPEC.tensors().keys()
    assert [c.cosine for c in found.candidates] == sorted(
        (c.cosine for c in found.candidates), reverse=True
    )


def test_a_sketch_reads_a_sample_and_tells_the_cosine(zoo):
    zoo, _, tuned = zoo
    for id_, base in tuned.items():
        a, b = (sketch.sketch(zoo, zoo.component(i)) for i in (id_, base))
        assert a.shape == b.shape and a.size < 18000
        reference = sketch.Reference(zoo.load_component(base))
        whole = sketch.cosine(zoo.load_component(id_), reference)[""]
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(whole, abs=0.01)


def test_a_short_file_is_damage(tmp_path):
    zoo = Zoo.create(tmp_path)
    id_ = zoo.put_component(SPEC, zoos.tensors(SPEC))
    next((zoo.path / "components" / id_).glob("params/up.weight/0.0")).write_bytes(b"12")
    with pytest.raises(ZooError, match="too short"):
        sketch.sketch(zoo, zoo.component(id_))


def test_each_is_compared_with_the_one_before_it_that_it_is_most_alike_to():
    pairs = [(0, 1, 0.91), (1, 2, 0.95), (0, 2, 0.92), (2, 3, 0.99)]
    assert sketch.nearest([0, 1, 2, 3], pairs) == [(1, 0, 0.91), (2, 1, 0.95), (3, 2, 0.99)]
    assert sketch.nearest([3, 0, 1, 2], pairs) == [(1, 0, 0.91), (2, 3, 0.99)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300),
)
def test_a_paired_change_lies_in_its_interval_and_never_is_certain(pairs):
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    score = metrics.paired(before, after)
    assert score.value == pytest.approx(after.mean() - before.mean())
    assert score.low is not None and score.high is not None
    assert score.low <= score.value <= score.high and score.low < score.high
    other = metrics.paired(after, before)
    assert (other.low, other.high) == pytest.approx((-score.high, -score.low))


def test_intervals_cover():
    """Of changes drawn with a known mean about 95 of 100 lie in their interval."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        before = rng.random(500) < 0.9
        flips = rng.random(500) < 0.04
        after = before ^ flips
        score = metrics.paired(before, after)
        hits += score.low <= -0.04 * 0.9 + 0.04 * 0.1 <= score.high
    assert 0.92 <= hits / 400 <= 0.98
    assert metrics.mean_score(np.full(9, 0.5), 90) == Score(value=0.5, low=0.5, high=0.5, count=90)
