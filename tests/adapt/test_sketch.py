"""Search: what is alike is found, by samples, and compared in full once."""

import numpy as np
import pytest
import zoos
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.adapt import candidates, scores, sketch
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
    found = candidates.search(zoo, used, 0.9, read.append)
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
    next((zoo.path / "components" / id_).glob("params*")).write_bytes(b"12")
    with pytest.raises(ZooError, match="2 bytes, expected"):
        sketch.sketch(zoo, zoo.component(id_))


def test_the_most_used_replace_the_others_and_of_equally_used_ones_the_first():
    pairs = [(0, 1, 0.91), (1, 2, 0.95), (0, 2, 0.92), (2, 3, 0.99)]
    assert sketch.counterparts(pairs, [1, 1, 1, 1], 1) == [
        (1, 0, 0.91),
        (2, 1, 0.95),
        (3, 2, 0.99),
    ]
    found = sketch.counterparts(pairs, [1, 1, 1, 2], 2)
    assert found == [(1, 0, 0.91), (2, 3, 0.99), (2, 1, 0.95)]


def test_neighbors_are_found_where_all_are_alike():
    """Versions of many fine-tunes of one base: any two are alike, and each has eight that are more so."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(4096, np.float32)
    tunes = base + 0.15 * rng.standard_normal((150, 4096), np.float32)
    rows = np.repeat(tunes, 9, axis=0) + 0.08 * rng.standard_normal((1350, 4096), np.float32)
    order = rng.permutation(len(rows))
    pairs = sketch.alike(rows[order], 0.9, [1] * len(rows))
    assert len(pairs) < 9 * len(rows)
    found = {frozenset((order[i] // 9 * 9, order[j] // 9 * 9)) for i, j, _ in pairs}
    assert sum(len(f) == 1 for f in found) == 150
    near = sum(order[i] // 9 == order[j] // 9 for i, j, _ in pairs)
    assert near >= 0.99 * 150 * 36  # of all pairs of versions of one fine-tune


def test_the_base_is_a_counterpart_though_siblings_are_nearer():
    rng = np.random.default_rng(1)
    base = rng.standard_normal(512, np.float32)
    tune = base + 0.3 * rng.standard_normal(512, np.float32)
    versions = tune + 0.01 * rng.standard_normal((20, 512), np.float32)
    pairs = sketch.alike(np.concatenate([base[None], versions]), 0.9, [9] + [1] * 20)
    assert {j for i, j, _ in pairs if i == 0} == set(range(1, 21))


def test_rows_of_zeros_and_of_no_numbers_are_like_nothing():
    rows = np.ones((6, 64), np.float32)
    rows[1], rows[3] = 0, np.nan
    assert {x for pair in sketch.alike(rows, 0.9, [1] * 6) for x in pair[:2]} == {0, 2, 4, 5}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300),
)
def test_a_paired_change_lies_in_its_interval_and_never_is_certain(pairs):
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    score = scores.paired(before, after)
    assert score.value == pytest.approx(after.mean() - before.mean())
    assert score.low is not None and score.high is not None
    assert score.low <= score.value <= score.high and score.low < score.high
    other = scores.paired(after, before)
    assert (other.low, other.high) == pytest.approx((-score.high, -score.low))


def test_intervals_cover():
    """Of changes drawn with a known mean about 95 of 100 lie in their interval."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        before = rng.random(500) < 0.9
        flips = rng.random(500) < 0.04
        after = before ^ flips
        score = scores.paired(before, after)
        hits += score.low <= -0.04 * 0.9 + 0.04 * 0.1 <= score.high
    assert 0.92 <= hits / 400 <= 0.98
    same = scores.mean_score(np.full(9, 0.5), 90)
    assert same == Score(value=0.5, low=0.5, high=0.5, count=90)


def test_rows_that_depend_on_each_other_widen_the_interval():
    """Rows that follow each other in a text are alike: of means of such rows 95 of 100 are covered still."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        slow = np.repeat(rng.standard_normal(32), 8)  # chapters of 8 rows
        score = scores.mean_score(slow + 0.3 * rng.standard_normal(256), 256)
        hits += score.low <= 0 <= score.high
    assert hits / 300 >= 0.9
