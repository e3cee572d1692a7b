"""The table of models: what the records say, without reading them."""

import shutil

import pytest
import zoos

from jblock.zoo.inventory import inventory
from jblock.zoo.listing import list_models
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

TOLD = ("chains", "components", "deltas", "logical_bytes", "stored_bytes")


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    first = zoos.fill(zoo)
    zoos.fill(zoo, seed=1)
    fields = {"name": "a", "base": "m@1", "version": 0, "origin": {"license": "mit", "x": 1}}
    zoo.publish(Chain.from_json(first.to_json() | fields))
    return zoo


def test_it_says_what_the_records_say(zoo, monkeypatch):
    every = inventory(zoo)
    read = []
    files = zoo.storage.read_many
    monkeypatch.setattr(zoo.storage, "read_many", lambda n: files(read.extend(n) or list(n)))
    listed = list_models(zoo)
    assert listed["totals"] == {key: every["totals"][key] for key in TOLD}
    for row, full in zip(listed["chains"], every["chains"], strict=True):
        assert row == {key: full[key] for key in row}
    assert [r["own_bytes"] > 0 for r in listed["chains"]] == [False, False, True]
    assert (listed["chains"][0]["origin"], listed["problems"]) == ({"license": "mit"}, [])
    assert read and not [path for path in read if path.endswith("1.json")]


def test_a_pointer_without_the_hash_of_a_record_is_read_with_it(zoo):
    before = list_models(zoo)
    zoos.forget_records(zoo, "m")
    assert list_models(zoo) == before
    zoos.fill(zoo, seed=2)  # the next change keeps what was read
    (zoo.path / "chains/m/1.json").write_text("{}")
    assert len(list_models(zoo)["chains"]) == 4


def test_what_is_lost_is_told(zoo):
    shutil.rmtree(zoo.path / "components" / zoo.chain("m").steps[1].component)
    zoos.forget_records(zoo, "a")
    (zoo.path / "chains/a/1.json").write_text("{}")
    (zoo.path / "chains/.DS_Store").write_text("")
    listed = list_models(zoo)
    assert [(r["name"], r["version"]) for r in listed["chains"]] == [("m", 1), ("m", 2)]
    for text in ("m@2 lacks 1 of", "a@1 cannot be read", ".DS_Store is no model"):
        assert any(text in problem for problem in listed["problems"])
