"""A zoo that someone made to do harm: its hashes fit, and what its records and files say is odd."""

import dataclasses
import json
import os
import stat
import time

import numpy as np
import pytest
import zoos

from jblock.adapt.quantization import quantize_chain
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import FfnSpec
from jblock.zoo import edges, lease, transfer
from jblock.zoo.codec import component_header
from jblock.zoo.fsck import fsck
from jblock.zoo.ids import content_id
from jblock.zoo.journal import Journal
from jblock.zoo.listing import list_models
from jblock.zoo.records import DamagedError, Step, ZooError, printable
from jblock.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    return zoo


def edit(zoo, name="m", **fields):
    """Changes the record of a model's first version, with hashes that fit."""
    path = zoo.path / "chains" / name / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    zoos.fit_record(zoo, name)


@pytest.mark.parametrize(
    "derived",
    [
        {"packed": 1},
        {"packed": ["gptq"]},
        {"chain": 5},
        {"chain": "\ud800@1"},
        {"chain": "../m@1"},
        {"command": ["quantize"]},
        {"command": {}},
    ],
)
def test_how_a_model_was_made_is_text(zoo, derived):
    path = zoo.path / "chains" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"derived": derived}))
    zoos.forget_records(zoo, "m")
    with pytest.raises(DamagedError, match="derived"):
        zoo.chain("m")
    assert "derived" in " ".join(list_models(zoo)["problems"] + fsck(zoo))


def test_packed_by_its_maker_is_no_excuse(zoo):
    """Only a method that checkpoints are read in, in a model that no other one was the origin of."""
    wide = FfnSpec(hidden_size=64, intermediate_size=64, norm_eps=1e-5)
    specs = (
        dataclasses.replace(zoos.EMBEDDING, hidden_size=64),
        wide,
        dataclasses.replace(zoos.NORM, hidden_size=64),
        dataclasses.replace(zoos.HEAD, hidden_size=64),
    )
    steps = tuple(Step(component=zoo.put_component(s, zoos.tensors(s))) for s in specs)
    chain = zoo.publish(dataclasses.replace(zoo.chain("m"), name="w", version=0, steps=steps))
    made = quantize_chain(zoo, chain, "q", QuantSpec(bits=4, group=64))
    gptq = {"quant_method": "gptq", "bits": 4}
    files = zoo.put_tokenizer({"a": b"b"})
    os.rename(zoo.path / "tokenizers" / files, zoo.path / "sources" / files)
    for derived, more in (
        ({"packed": {}}, {}),
        ({"packed": {"quant_method": "none"}}, {}),
        ({"packed": {"quant_method": ["gptq"]}}, {}),
        ({"packed": gptq, "chain": "w@1"}, {}),
        ({"packed": gptq, "command": "quantize"}, {}),
        ({"packed": gptq, "bits": 4}, {}),
        ({"packed": gptq}, {"source_files": files}),
        ({"chain": "w@1"}, {}),
        ({}, {}),
    ):
        fields = {"name": "x", "version": 0, "policy": "exact", "derived": derived, **more}
        with pytest.raises(DamagedError, match="makes it near"):
            zoo.publish(dataclasses.replace(made, **fields))
    fields = {"name": "x", "version": 0, "policy": "exact", "derived": {"packed": gptq}}
    assert zoo.publish(dataclasses.replace(made, **fields)).policy == "exact"


def test_a_step_does_not_borrow_the_digest_of_another(zoo, tmp_path):
    """`whole` says what a component and its deltas are together, and is what the digest covers."""
    other = zoos.fill(zoo, "other", seed=1)
    whole = {"1": other.steps[1].component, "0": other.steps[0].component}
    edit(zoo, whole=whole)
    with pytest.raises(DamagedError, match="other content"):
        transfer.copy(zoo, Zoo.create(tmp_path / "there"), "m")
    assert any("other content" in line for line in fsck(zoo))
    # What it truly makes is taken.
    chain = zoo.chain("other")
    norm = zoo.component(chain.steps[2].component)
    id_ = content_id(component_header(norm), zoo.load_component(norm.id))
    edit(zoo, whole={}), edit(zoo, "other", whole={"2": id_})
    assert fsck(zoo) == []
    transfer.copy(zoo, Zoo.create(tmp_path / "more"), "other")


@pytest.mark.parametrize("index", ["9" * 5000, "\u0661", "01", "-0", " 1", "1e0", ""])
def test_a_step_is_named_by_its_number(zoo, index):
    path = zoo.path / "chains" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"whole": {index: "0" * 64}}))
    zoos.forget_records(zoo, "m")
    with pytest.raises(DamagedError, match="whole"):
        zoo.chain("m")
    assert fsck(zoo)


@pytest.mark.parametrize("version", ["9" * 5000, "\u0661", "-1", "0", "01", "1 ", "1e0", "stable"])
def test_a_version_is_a_number_or_an_alias(zoo, version):
    for call in (zoo.chain, zoo.activate):
        with pytest.raises(ZooError, match="known: 1"):
            call("m", version)


@pytest.mark.parametrize("number", ["1e999", "NaN", "9" * 5000])
@pytest.mark.parametrize("file", ["chains/m/1.json", "chains/m/model.json", "edges/{e}.json"])
def test_numbers_are_finite(zoo, file, number):
    path = zoo.path / file.format(e="0" * 64)
    data = json.loads(path.read_text()) if path.exists() else {"scores": {}}
    text = json.dumps(data | {"generation": {"temperature": "HERE"}})
    if "model" in file:
        data["history"][0]["time"] = "HERE"
        text = json.dumps(data)
    path.write_text(text.replace('"HERE"', number))
    found = [*list_models(zoo)["problems"], *fsck(zoo)]
    assert found and all("\n" not in line for line in found)
    edges.edges(zoo, [])
    if "edges" not in file:
        with pytest.raises(ZooError):
            zoo.chain("m")


@pytest.mark.parametrize(
    "file", ["components/{c}/spec.json", "chains/m/1.json", "chains/m/model.json"]
)
@pytest.mark.parametrize("filler", [b"{},", b"1,"])
def test_a_file_of_very_many_values_is_not_parsed(zoo, file, filler):
    path = zoo.path / file.format(c=zoo.chain("m").steps[1].component)
    data = json.loads(path.read_text()) | {"history": ["HERE"]}
    whole = json.dumps(data).encode().replace(b'"HERE"', filler * 1_100_000 + b"1")
    path.write_bytes(whole)
    with pytest.raises(DamagedError, match="values"):
        Zoo.open(zoo.path).check_chain(zoo.chain("m"))


def test_a_path_that_is_no_text_breaks_no_model(zoo):
    """A folder named by bytes of another encoding, and names that a terminal would obey."""
    odd = os.fsdecode(b"/data/caf\xe9/\x1b[31m\nx")
    chain = dataclasses.replace(zoo.chain("m"), name="o", version=0, origin={"source": odd})
    zoo.publish(chain)
    zoo.publish(dataclasses.replace(chain, max_position=8))
    found = list_models(zoo)
    assert found["problems"] == [] and fsck(zoo) == []
    shown = [row["origin"]["source"] for row in found["chains"] if row["name"] == "o"]
    assert shown == [r"/data/caf\udce9/\x1b[31m\nx"] * 2
    assert zoo.model("o").history[0]["source"] == shown[0]
    assert printable("a b \u00e4 [x]") == "a b \u00e4 [x]"


# Leases and locks that nobody's process wrote


@pytest.mark.parametrize(
    "mark",
    [
        b"[" * 4000,
        b"{",
        b"\xff",
        b"[]",
        b'{"seconds": NaN}',
        b'{"seconds": 1e999}',
        b'{"seconds": -1}',
        b'{"seconds": "x"}',
        b'{"seconds": ' + b"9" * 400 + b"}",
        b'{"host": [1]}',
    ],
)
def test_an_odd_lease_expires_as_any(zoo, mark):
    folder = zoo.path / "tmp" / ("0" * 16)
    folder.mkdir()
    (folder / "lease").write_bytes(mark)
    lock = zoo.path / "locks" / "99"
    lock.write_text(folder.name)
    long_ago = time.time() - 7200
    for path in (folder / "lease", folder):
        os.utime(path, (long_ago, long_ago))
    assert "lease" in lease.describe(folder)
    zoos.fill(zoo, "n", seed=1)
    assert not folder.exists()


@pytest.mark.parametrize("lock", [b"\xff\xfe", b"..", b"../..", b"a/b", b"\0", b"", None, "folder"])
def test_an_odd_lock_is_free_after_a_while(zoo, lock):
    path = zoo.path / "locks" / "99"
    if lock is None:
        os.mkfifo(path)
    elif lock == "folder":
        path.mkdir()
    else:
        path.write_bytes(lock)
    os.utime(path, (time.time() - 61, time.time() - 61))
    zoos.fill(zoo, "n", seed=1)
    assert fsck(zoo) == []


def test_a_journal_of_another_is_not_believed(zoo):
    """It says which component a part of a checkpoint became; the checkpoint is read again instead."""
    key, planted = "1" * 64, zoo.chain("m").steps[1].component
    with zoo.writer(key) as writer:
        own = writer.put_component(zoos.NORM, zoos.tensors(zoos.NORM, 5))
        writer.finish("norm", own)
    path = zoo.path / "journal" / f"{key}.json"
    assert Journal(zoo.path, key).ids and stat.S_IMODE(path.stat().st_mode) == 0o644
    label = next(iter(Journal(zoo.path, key).ids))
    path.write_text(json.dumps({label: planted}))
    path.chmod(0o664)  # as whatever others of the group may write to
    with zoo.writer(key) as writer:
        assert writer.finished("norm") is None
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, 41001, -1)
        assert Journal(zoo.path, key).ids == {}
        os.chown(path, 0, -1)
    path.write_bytes(b"[" * 100_000)
    assert Journal(zoo.path, key).ids == {}
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert Journal(zoo.path, key).ids == {}
    path.unlink()
    os.mkfifo(path)
    assert Journal(zoo.path, key).ids == {}
    assert np.array_equal(zoo.load_component(own)["weight"], zoos.tensors(zoos.NORM, 5)["weight"])
