"""fsck: what is damaged is named; what a crash can leave is not called damage."""

import dataclasses
import json
import os
import shutil

import pytest
import zoos

from jblock.zoo import gc
from jblock.zoo.fsck import fsck
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A zoo nothing is wrong with."""
    zoo = Zoo.create(tmp_path_factory.mktemp("sound") / "zoo")
    zoos.fill(zoo)
    return zoo.path


@pytest.fixture
def zoo(sound, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(sound, tmp_path / "zoo")
    return Zoo.open(tmp_path / "zoo")


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def swap_steps(path):
    steps = json.loads(path.read_text())["steps"]
    edit(path, steps=[steps[0], steps[2], steps[1], *steps[3:]])


def component(zoo, step=1):
    return zoo.path / "components" / zoo.chain("m").steps[step].component


def delta(zoo):
    return zoo.path / "deltas" / zoo.chain("m").steps[1].deltas[0]


def tokenizer(zoo):
    return zoo.path / "tokenizers" / zoo.chain("m").tokenizer


@pytest.mark.parametrize(
    "damage",
    [
        lambda z: flip(component(z) / "params.safetensors"),
        lambda z: (component(z) / "params.safetensors").write_bytes(b""),
        lambda z: (component(z) / "params.safetensors").unlink(),
        lambda z: flip(component(z) / "params.safetensors", 12),
        lambda z: flip(component(z) / "params.safetensors", 0),
        lambda z: shutil.rmtree(component(z)),
        lambda z: shutil.rmtree(component(z, 0)),
        lambda z: (component(z) / "spec.json").write_text("{"),
        lambda z: (component(z) / "spec.json").write_text("[]"),
        lambda z: (component(z) / "spec.json").unlink(),
        lambda z: edit(component(z) / "spec.json", nbytes=1),
        lambda z: edit(component(z) / "spec.json", tensors={}),
        lambda z: edit(component(z) / "spec.json", spec={"kind": "warp"}),
        lambda z: edit(component(z, 3) / "spec.json", refs={"weight": ["0" * 64, "weight"]}),
        lambda z: edit(component(z, 3) / "spec.json", refs={"weight": "x"}),
        lambda z: component(z).rename(z.path / "components" / ("0" * 64)),
        lambda z: (z.path / "components" / "stray").mkdir(),
        lambda z: flip(delta(z) / "params.safetensors"),
        lambda z: edit(delta(z) / "spec.json", component="0" * 64),
        lambda z: shutil.rmtree(delta(z)),
        lambda z: flip(tokenizer(z) / "tokenizer.json"),
        lambda z: (tokenizer(z) / "merges.txt").unlink(),
        lambda z: shutil.rmtree(tokenizer(z)),
        lambda z: edit(z.path / "chains/m/1.json", version=2),
        lambda z: edit(z.path / "chains/m/1.json", name="n"),
        lambda z: edit(z.path / "chains/m/1.json", surprise=1),
        lambda z: edit(z.path / "chains/m/1.json", base="gone@1"),
        lambda z: (z.path / "chains/m/1.json").write_text("{"),
        lambda z: (z.path / "chains/m/1.json").unlink(),
        lambda z: edit(z.path / "chains/m/1.json", eos_token_ids=[3]),
        lambda z: swap_steps(z.path / "chains/m/1.json"),
        lambda z: edit(z.path / "chains/m/model.json", active=2),
        lambda z: edit(z.path / "chains/m/model.json", next=1),
        lambda z: edit(z.path / "chains/m/model.json", surprise=1),
        lambda z: (z.path / "chains/m/model.json").write_text("{"),
        lambda z: (z.path / "chains/.DS_Store").write_text("x"),
        lambda z: (z.path / "components/.DS_Store").write_text("x"),
        lambda z: (z.path / "edges/note.txt").write_text("x"),
    ],
)
def test_damage_is_found(zoo, damage):
    assert fsck(zoo) == []
    damage(zoo)
    problems = fsck(zoo)
    assert problems
    assert all("\n" not in line for line in problems)


def test_damaged_bytes_are_told_on_a_checked_load(zoo):
    id_ = zoo.chain("m").steps[0].component
    flip(component(zoo, 0) / "params.safetensors")
    zoo.load_component(id_)
    with pytest.raises(ZooError, match="other content"):
        zoo.load_component(id_, verify=True)
    head = zoo.chain("m").steps[3].component
    with pytest.raises(ZooError, match="other content"):
        zoo.load_component(head, verify=True)


def test_what_a_crash_leaves_is_no_damage(zoo):
    (zoo.path / "chains" / "new").mkdir()  # killed before its first version
    (zoo.path / "chains" / "newer").mkdir()
    edit_to = json.loads((zoo.path / "chains/m/1.json").read_text()) | {"name": "newer"}
    (zoo.path / "chains/newer/1.json").write_text(json.dumps(edit_to))  # killed before it was live
    (zoo.path / "tmp" / "dead" / "components-x").mkdir(parents=True)
    os.utime(zoo.path / "tmp" / "dead", (1, 1))
    # Killed between its second version and the pointer.
    edit_to = json.loads((zoo.path / "chains/m/1.json").read_text()) | {"version": 2}
    (zoo.path / "chains/m/2.json").write_text(json.dumps(edit_to))
    assert fsck(zoo) == []
    assert (zoo.chains(), zoo.versions("m")) == (["m"], [1])
    assert not any((zoo.path / "tmp").iterdir())
    # The next writer takes the number, and gc takes what is left.
    assert zoos.fill(zoo, seed=1).version == 2
    gc.collect(zoo, dry_run=False)
    assert not (zoo.path / "chains/newer/1.json").exists()
    assert fsck(zoo) == []


OTHER = {
    "base": "m@9",
    "base_digest": "0" * 64,
    "tokenizer": None,
    "tokenizer_files": "0" * 64,
    "source_files": "0" * 64,
    "bos_token_id": 3,
    "eos_token_ids": [2],
    "max_position": 17,
    "policy": "near",
    "family": "gpt2",
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Chain)])
def test_no_field_of_a_record_is_another_unseen(zoo, field):
    """Whether the digest covers it or not; and what is made again is the version that it was."""
    path = zoo.path / "chains/m/1.json"
    data = json.loads(path.read_text())
    value = data[field]
    if isinstance(value, dict):
        other = value | {"surprise": 1}
    elif field in OTHER:
        other = OTHER[field]
    elif field == "steps":
        other = [value[0], value[1] | {"deltas": []}, *value[2:]]
    else:
        other = value + 1 if isinstance(value, int) else value + "x"
    assert other != value
    edit(path, **{field: other})
    assert fsck(zoo)
    repair(zoo)
    assert fsck(zoo) == []
    assert (zoos.fill(zoo).version, zoo.versions("m")) == (1, [1])
    assert fsck(zoo) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digest", "0" * 64),
        ("named", "0" * 16),
        ("family", "gpt2"),
        ("base", "n@1"),
        ("made_from", "n@1"),
        ("policy", "near"),
        ("origin", {"license": "mit"}),
    ],
)
def test_a_pointer_says_of_a_version_what_that_says_itself(zoo, field, value):
    path = zoo.path / "chains/m/model.json"
    (entry,) = json.loads(path.read_text())["versions"]
    edit(path, versions=[entry | {field: value}])
    (problem,) = fsck(zoo)
    assert "says other things of version 1" in problem
    assert "what they say themselves" in repair(zoo)[0]
    assert fsck(zoo) == []
    assert zoos.fill(zoo).version == 1


def test_what_a_killed_writer_left_without_its_target_is_no_damage(zoo):
    embedding = zoo.put_component(zoos.EMBEDDING, zoos.tensors(zoos.EMBEDDING, 9))
    zoo.put_component(zoos.HEAD, {}, {"weight": (embedding, "weight")})
    shutil.rmtree(zoo.path / "components" / embedding)
    assert fsck(zoo) == []
    assert len(gc.collect(zoo, dry_run=False)) == 1
