"""gc and rm take what nothing relies on, and nothing else."""

import json
import os
import time

import pytest
import zoos

from jblock.zoo import gc
from jblock.zoo.fsck import fsck
from jblock.zoo.records import Chain, NotFoundError, ZooError
from jblock.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    return zoo


def ids(found):
    return {g.id for g in found}


def test_what_models_name_stays(zoo):
    assert gc.collect(zoo, dry_run=True) == []
    assert gc.collect(zoo, dry_run=False) == []
    assert fsck(zoo) == []


def test_a_dry_run_only_tells(zoo):
    lost = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    delta = zoo.put_delta(zoos.LORA, lost, zoos.lora_tensors(9))
    before = sorted(zoo.path.rglob("*"))
    found = gc.collect(zoo, dry_run=True)
    assert ids(found) == {lost, delta}
    assert all(g.nbytes > 0 for g in found)
    assert sorted(zoo.path.rglob("*")) == before
    assert gc.collect(zoo, dry_run=False) == found
    assert gc.collect(zoo, dry_run=True) == []
    with pytest.raises(NotFoundError):
        zoo.component(lost)
    assert fsck(zoo) == []


def test_rm_then_gc_keeps_what_another_model_shares(zoo):
    zoos.fill(zoo, name="same")
    zoos.fill(zoo, name="other", seed=1)
    assert gc.remove(zoo, "same") == ["same@1"]
    assert gc.collect(zoo, dry_run=True) == []
    assert gc.remove(zoo, "other") == ["other@1"]
    assert len(gc.collect(zoo, dry_run=False)) == 5  # the tokenizer is m's too
    assert zoo.chains() == ["m"]
    assert fsck(zoo) == []


def test_old_versions(zoo):
    zoos.fill(zoo, seed=1)
    with pytest.raises(ZooError, match="m@2 is the active version"):
        gc.remove(zoo, "m", 2)
    assert gc.remove(zoo, "m", 1) == ["m@1"]
    assert zoo.versions("m") == [2]
    with pytest.raises(ZooError, match="m@1"):
        gc.remove(zoo, "m", 1)
    with pytest.raises(ZooError, match="nobody"):
        gc.remove(zoo, "nobody")


def test_a_base_and_what_an_edge_names_are_protected(zoo):
    chain = zoo.chain("m")
    zoo.publish(Chain.from_json(chain.to_json() | {"name": "a", "version": 0, "base": "m@1"}))
    with pytest.raises(ZooError, match="a@1 is an adapter on m@1"):
        gc.remove(zoo, "m")
    loose = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    edge = zoo.path / "edges" / f"{'e' * 64}.json"
    edge.write_text(json.dumps({"kind": "equivalent", "components": [loose], "of": "a@1"}))
    assert gc.collect(zoo, dry_run=False) == []
    with pytest.raises(ZooError, match=r"e\.json names a@1"):
        gc.remove(zoo, "a")
    edge.unlink()
    assert ids(gc.collect(zoo, dry_run=False)) == {loose}


def test_a_living_writer_keeps_what_it_found_and_what_it_added(zoo):
    loose = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    with zoo.writer() as writer:
        writer.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
        new = writer.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=8))
        writer.commit()
        assert gc.collect(zoo, dry_run=False) == []
    assert ids(gc.collect(zoo, dry_run=False)) == {loose, new}


def test_publishing_what_is_gone_is_refused(zoo):
    chain = zoo.chain("m")
    gc.remove(zoo, "m")
    gc.collect(zoo, dry_run=False)
    with pytest.raises(NotFoundError):
        zoo.publish(Chain.from_json(chain.to_json() | {"version": 0}))
    assert zoo.chains() == []


def test_an_unfinished_conversion_is_kept_for_a_day(zoo):
    with pytest.raises(KeyboardInterrupt), zoo.writer("0" * 64) as writer:
        id_ = writer.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
        writer.finish("ffn", id_)
        writer.commit()
        raise KeyboardInterrupt
    assert gc.collect(zoo, dry_run=False) == []
    with zoo.writer("0" * 64) as writer:
        assert writer.finished("ffn") == id_
        assert writer.finished("other") is None
    with zoo.writer("1" * 64) as writer:
        assert writer.finished("ffn") is None
    then = time.time() - 25 * 3600
    os.utime(zoo.path / "journal" / f"{'0' * 64}.json", (then, then))
    assert ids(gc.collect(zoo, dry_run=False)) == {id_}
    with zoo.writer("0" * 64) as writer:
        assert writer.finished("ffn") is None


def test_a_damaged_record_stops_nothing_and_what_it_named_stays(zoo):
    zoos.fill(zoo, name="other", seed=1)
    loose = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    (zoo.path / "chains" / "m" / "1.json").write_text("{")
    problems = []
    assert ids(gc.collect(zoo, dry_run=False, problems=problems)) == {loose}
    assert any("chains/m/1.json" in p for p in problems)
    assert gc.remove(zoo, "other") == ["other@1"]
    assert len(gc.collect(zoo, dry_run=False)) == 5
    assert gc.remove(zoo, "m") == ["m@1"]  # the damaged one too
    gc.collect(zoo, dry_run=False)
    assert os.listdir(zoo.path / "components") == []
    assert fsck(zoo) == []


def test_a_damaged_edge_keeps_what_was_there_when_it_was_written(zoo):
    before = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=8))
    path = zoo.path / "edges" / f"{'e' * 64}.json"
    path.write_text("{")
    after = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    then = time.time() - 100
    os.utime(zoo.folder("components", before), (then - 100, then - 100))
    os.utime(path, (then, then))
    problems = []
    assert ids(gc.collect(zoo, dry_run=False, problems=problems)) == {after}
    assert any("1 entries" in p for p in problems)
