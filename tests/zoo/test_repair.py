"""fsck --repair: derived records are written anew, damage is set aside and can be made again."""

import errno
import json
import os

import pytest
import zoos

from jblock.zoo import edges, gc
from jblock.zoo.acceptance import AcceptancePolicy
from jblock.zoo.edge_records import Edge, Score
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import edge_inventory, inventory
from jblock.zoo.records import NewerError, ZooError
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    return zoo


def test_a_sound_zoo_stays_as_it_is(zoo):
    assert repair(zoo) == []
    assert fsck(zoo) == []


@pytest.mark.parametrize(
    "file",
    [
        "components/{c}/params.safetensors",
        "components/{c}/spec.json",
        "deltas/{d}/spec.json",
        "tokenizers/{t}/merges.txt",
    ],
)
def test_damage_is_set_aside_and_made_again(zoo, file):
    chain = zoo.chain("m")
    step = chain.steps[1]
    path = file.format(c=step.component, d=step.deltas[0], t=chain.tokenizer)
    (zoo.path / path).write_bytes(b"{")
    assert fsck(zoo) != []
    done = repair(zoo)
    assert "convert one of m@1 again" in done[0]
    # Moved away: what was damaged, and the version that lacks it; what is left is sound.
    assert len(list((zoo.path / "quarantine").iterdir())) in (2, 3)
    assert (zoo.chains(), fsck(zoo)) == ([], [])
    assert inventory(zoo)["problems"] == []
    assert zoos.fill(zoo) == chain  # under the number it had
    assert fsck(zoo) == []


def test_damage_that_nothing_uses(zoo):
    loose = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    (zoo.path / "components" / loose / "params.safetensors").write_bytes(b"")
    (done,) = repair(zoo)
    assert "no model uses it" in done
    assert fsck(zoo) == []


@pytest.mark.parametrize("pointer", [None, "", "{", "[]", '{"active": 99}'])
def test_the_newest_sound_version_becomes_active(zoo, pointer):
    zoos.fill(zoo, seed=1)
    zoos.fill(zoo, seed=2)
    (zoo.path / "chains" / "m" / "3.json").write_text("{}")
    if pointer is not None:
        (zoo.path / "chains" / "m" / "model.json").write_text(pointer)
    assert repair(zoo)[-1] == "m: its active version is now 2"
    assert (zoo.active("m"), zoo.versions("m")) == (2, [1, 2])
    assert fsck(zoo) == []
    assert zoos.fill(zoo, seed=3).version == 4  # 3 is never given again


def test_a_pointer_that_went_missing_is_no_model_that_never_was(zoo):
    zoos.fill(zoo, seed=1)
    (zoo.path / "chains" / "m" / "model.json").unlink()
    assert any(
        "model.json is missing" in line for line in (*inventory(zoo)["problems"], *fsck(zoo))
    )
    assert gc.collect(zoo, dry_run=False) == []
    with pytest.raises(ZooError, match="is missing"):
        zoos.fill(zoo, seed=2)
    repair(zoo)
    assert (zoo.active("m"), zoo.versions("m"), fsck(zoo)) == (2, [1, 2], [])
    assert zoos.fill(zoo, seed=2).version == 3


@pytest.mark.parametrize("away", ["fsck --repair", "rm"])
def test_a_damaged_pointer_lets_no_number_be_given_again(zoo, away):
    zoos.fill(zoo, seed=1)
    zoos.fill(zoo, seed=2)
    zoo.activate("m", 1)
    gc.remove(zoo, "m", 3)
    path = zoo.path / "chains" / "m" / "model.json"
    path.write_bytes(path.read_bytes()[:-40])
    repair(zoo) if away != "rm" else gc.remove(zoo, "m")
    assert zoos.fill(zoo, seed=5).version == 4


def test_what_cannot_be_read_is_not_taken_for_damage(zoo, monkeypatch):
    opened = os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith("params.safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        assert any("nothing says that it is damaged" in p for p in fsck(zoo))
        assert repair(zoo) == []
    assert fsck(zoo) == []


def test_a_record_of_a_newer_version_is_told_and_left_alone(zoo):
    path = zoo.path / "chains" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    assert any("newer version" in p for p in fsck(zoo))
    assert repair(zoo) == []
    zoos.fill(zoo, name="other", seed=1)
    assert [row["name"] for row in inventory(zoo)["chains"]] == ["other"]
    assert path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(surprise=1),
        lambda d: d.update(kind="better"),
        lambda d: d["scores"].update(bleu={"value": 1.0}),
        lambda d: d["scores"]["parameter_cosine"].update(unit="none"),
        lambda d: d["original"][0].update(layer=3),
    ],
)
def test_an_edge_of_a_newer_version_is_told_and_left_alone(zoo, change):
    step = zoo.chain("m").steps[1]
    scores = {"parameter_cosine": Score(value=0.9)}
    edge = Edge(kind="equivalent", original=(step,), substitute=(step,), scores=scores)
    (id_,) = edges.put_edges(zoo, edge)
    path = zoo.path / "edges" / f"{id_}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    (line,) = fsck(zoo)
    assert "newer version" in line
    assert repair(zoo) == [] and path.exists()
    assert edge_inventory(zoo, AcceptancePolicy())["problems"] != []


def test_a_step_of_a_newer_version_is_not_read_as_another(zoo):
    path = zoo.path / "chains" / "m" / "1.json"
    data = json.loads(path.read_text())
    data["steps"][1]["scale"] = 2
    path.write_text(json.dumps(data))
    zoos.forget_records(zoo, "m")
    with pytest.raises(NewerError, match="scale"):
        zoo.chain("m")
    assert repair(zoo) == [] and path.exists()


def test_what_is_nothing_of_a_zoo_is_moved_away(zoo):
    for name in ("components/.DS_Store", "chains/.DS_Store", "edges/._x", "deltas/x y"):
        (zoo.path / name).write_text("x")
    assert len(fsck(zoo)) == 4
    assert zoos.fill(zoo, name="other", seed=1).version == 1
    assert len(inventory(zoo)["chains"]) == 2
    assert len(repair(zoo)) == 4
    assert fsck(zoo) == []


def test_hashing_holds_no_lock(zoo, monkeypatch):
    checked = []

    def publish_meanwhile(self, record):
        with zoo.changing("another process"):
            checked.append(record.id)

    monkeypatch.setattr(Zoo, "check_component", publish_meanwhile)
    repair(zoo)
    assert len(checked) == 4
