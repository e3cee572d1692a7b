"""Zoos that earlier versions wrote are read as they are, and added to."""

import json
import tarfile
from pathlib import Path

import pytest
import zoos

from jblock.zoo import gc
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import inventory
from jblock.zoo.listing import list_models
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo
from jblock.zoo.transfer import copy

FIXTURE = Path(__file__).parent.parent / "fixtures" / "zoo_format_1.tar.gz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(tmp_path, filter="data")
    return Zoo.open(tmp_path / "zoo")


def test_it_is_read(old):
    assert (old.chains(), old.versions("m"), old.active("m")) == (["a", "m"], [1, 2], 2)
    assert fsck(old) == []
    chain = old.chain("m", 1)
    tensors = old.load_component(chain.steps[1].component, verify=True)
    assert all((tensors[n] == t).all() for n, t in zoos.tensors(zoos.FFN).items())
    assert old.read_runs(chain.steps[1].component, "up.weight", [3, 5], 2).tolist() == [
        *zoos.tensors(zoos.FFN)["up.weight"].reshape(-1)[[3, 4, 5, 6]].tolist()
    ]
    row = next(r for r in inventory(old)["chains"] if (r["name"], r["version"]) == ("m", 2))
    assert row["active"]
    assert [(r["name"], r["version"]) for r in list_models(old)["chains"]] == [
        ("a", 1),
        ("m", 1),
        ("m", 2),
    ]
    # A field that has another name now is covered by the id under its first one.
    specs = [old.component(i).spec for i in old.storage.names("components")]
    assert sum(getattr(spec, "transposed", False) for spec in specs) == 1


def test_it_is_added_to_and_becomes_format_2(old):
    first = old.chain("m", 1)
    assert zoos.fill(old) == first  # equal, so it becomes active again
    assert json.loads((old.path / "zoo.json").read_text()) == {"format": 2}
    assert (old.active("m"), old.versions("m")) == (1, [1, 2])
    third = zoos.fill(old, seed=2)
    assert third.version == 3
    assert old.rollback("m").active == 1
    with pytest.raises(ValueError, match="a@1 is an adapter on m@1"):
        gc.remove(old, "m")
    assert old.chain("a").base == "m@1"
    assert fsck(old) == []


def test_it_is_copied_into_a_new_one(old, tmp_path):
    target = Zoo.create(tmp_path / "new")
    copied = copy(old, target, "a")
    assert [(c.chain.name, c.active) for c in copied] == [("m", False), ("a", True)]
    chain = target.chain("a")
    assert chain.base_digest == old.chain("m", 1).digest
    # One folder, one record, one file of tensors.
    for step in chain.steps[:3]:
        folder = target.folder("components", step.component)
        assert sorted(p.name for p in folder.iterdir()) == ["params.safetensors", "spec.json"]
    assert fsck(target) == []


@pytest.mark.parametrize("text", ["", "x", "99\n"])
def test_a_damaged_pointer_is_made_again(old, text):
    (old.path / "chains" / "m" / "current").write_text(text)
    assert any("active version" in p for p in fsck(old))
    assert repair(old)[-1] == "m: its active version is now 2"
    assert fsck(old) == []


@pytest.mark.parametrize("file", [".zarray", "0.0"])
def test_damage_of_its_tensors_is_told(old, file):
    ffn = old.chain("m", 1).steps[1].component
    path = old.path / "components" / ffn / "params" / "up.weight" / file
    path.write_bytes(b"{")
    assert any(ffn in p for p in fsck(old))
