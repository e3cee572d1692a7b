"""Models made from others: quantized copies, from the command line."""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny

from jblock.zoo import edges
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo


@pytest.fixture
def filled(cli, tmp_path):
    """A base and an adapter on it."""
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    cli.ok("peft", tiny.write_adapter(tmp_path / "a"), "--base", "base", "--name", "a")
    return cli


def test_a_quantized_copy_is_a_model_with_edges_to_its_original(filled):
    made = json.loads(filled.ok("quantize", "base", "--bits", 4, "--group", 8, "--json"))
    assert (made["name"], made["policy"], made["chain"]) == ("base-int4", "near", "base@1")
    assert 0.02 < made["parameter_error"] < 0.15
    assert made["bytes_after"] < 0.4 * made["bytes_before"]
    zoo = Zoo.open(filled.zoo)
    base, small = zoo.chain("base"), zoo.chain("base-int4")
    changed = {
        (b.component, s.component)
        for b, s in zip(base.steps, small.steps, strict=True)
        if b.component != s.component
    }
    found = edges.edges(zoo)
    assert {(e.original[0].component, e.substitute[0].component) for e in found} == changed
    assert len(changed) == 2 * tiny.LAYERS
    for edge in found:
        assert edge.policy == "near" and 0.02 < edge.scores["parameter_error"].value < 0.15
    # The same again, by the command's other spelling, is the same: no new version, no second edge.
    again = json.loads(filled.ok("quantise", "base", "--bits", 4, "--group", 8, "--json"))
    assert again["version"] == 1 and edges.edge_ids(zoo) == sorted(e.id for e in found)
    assert fsck(zoo) == []
    assert json.loads(filled.ok("gc", "--json"))["garbage"] == []


def test_a_copy_of_an_adapter_keeps_its_deltas(filled):
    filled.ok("quantize", "a", "--bits", 8, "--name", "a8")
    zoo = Zoo.open(filled.zoo)
    for old, new in zip(zoo.chain("a").steps, zoo.chain("a8").steps, strict=True):
        assert len(old.deltas) == len(new.deltas)
        for a, b in zip(old.deltas, new.deltas, strict=True):
            ours, theirs = zoo.load_delta(a), zoo.load_delta(b)
            assert {n: v.tobytes() for n, v in ours.items()} == {
                n: v.tobytes() for n, v in theirs.items()
            }
    assert fsck(zoo) == []


def test_it_goes_to_another_zoo_and_no_export_pretends_to_be_its_source(filled, tmp_path):
    filled.ok("quantize", "base", "--bits", 8)
    result = filled("export", "base-int8", "--out", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert "was made from base@1 by 'quantize', which loses something" in result.err
    assert "export base@1" in result.err
    filled.ok("copy", "base-int8", "--to", tmp_path / "other")
    other = Zoo.open(tmp_path / "other")
    assert other.chain("base-int8").policy == "near" and fsck(other) == []
    differences = filled("verify", "base-int8", "--against", tmp_path / "base")
    assert differences.code == 1 and "has another spec" in differences.out


@pytest.mark.parametrize(
    "argv, said",
    [
        (("base", "--name", "base"), "is the model itself"),
        (("base", "--bits", 4, "--group", 0), "group is 0"),
        (("base-int4",), "is quantized already"),
        (("nobody",), "no model 'nobody'"),
    ],
)
def test_what_cannot_be_quantized(filled, argv, said):
    filled.ok("quantize", "base")
    before = tiny.files_of(filled.zoo)
    result = filled("quantize", *argv)
    assert result.code == 2 and said in result.err
    assert tiny.files_of(filled.zoo) == before


def test_whole_numbers_have_their_place(filled, tmp_path):
    """Codes where a spec wants floats, or the other way round, are refused."""
    import dataclasses

    from jblock.blocks.quant_spec import QuantSpec
    from jblock.zoo.records import ZooError

    zoo = Zoo.open(filled.zoo)
    record = zoo.component(zoo.chain("base").steps[2].component)
    tensors = zoo.load_component(record.id)
    with pytest.raises(ZooError, match=r"'up.weight' is int8, expected float32 or"):
        zoo.put_component(record.spec, tensors | {"up.weight": np.zeros((24, 16), np.int8)})
    spec = dataclasses.replace(record.spec, quant=QuantSpec(bits=8, group=8))
    wrong = {n: np.zeros(shape, np.float32) for n, shape in spec.tensors().items()}
    with pytest.raises(ZooError, match=r"'down.codes' is float32, expected int8"):
        zoo.put_component(spec, wrong)


@pytest.fixture
def tuned(filled, tmp_path):
    """A fine-tune of the second layer of the base."""
    rng = np.random.default_rng(3)
    tensors = {
        n: v + np.float32(0.05) * rng.standard_normal(v.shape).astype(np.float32)
        if "layers.1." in n
        else v
        for n, v in tiny.weights(tiny.CONFIG).items()
    }
    filled.ok("hf", tiny.write_checkpoint(tmp_path / "t", tensors=tensors), "--name", "tuned")
    return filled


def test_a_fine_tune_becomes_deltas_on_its_base(tuned, tmp_path):
    argv = ("compress", "tuned", "--base", "base", "--budget", 0.25, "--json")
    made = json.loads(tuned.ok(*argv))
    assert (made["name"], made["policy"], made["base"]) == ("tuned-small", "near", "base@1")
    assert made["bytes_after"] <= 0.25 * made["bytes_before"]
    zoo = Zoo.open(tuned.zoo)
    base, small = zoo.chain("base"), zoo.chain("tuned-small")
    assert [s.component for s in small.steps] == [s.component for s in base.steps]
    assert [bool(s.deltas) for s in small.steps] == [False] * 3 + [True] * 2 + [False] * 2
    found = edges.edges(zoo)
    own = [s.component for s in zoo.chain("tuned").steps[3:5]]
    assert {e.original[0].component for e in found} == set(own)
    assert {e.substitute[0].deltas for e in found} == {s.deltas for s in small.steps[3:5]}
    assert json.loads(tuned.ok(*argv))["version"] == 1
    assert fsck(zoo) == [] and json.loads(tuned.ok("gc", "--json"))["garbage"] == []
    result = tuned("export", "tuned-small", "--out", tmp_path / "out")
    assert result.code == 2 and "was made from tuned@1 by 'compress'" in result.err
    # The base's components stay as long as the deltas on them are used.
    tuned.ok("rm", "tuned")
    tuned.ok("gc", "--delete")
    assert fsck(zoo) == []


@pytest.mark.parametrize(
    "argv, said",
    [
        (("tuned", "--base", "base", "--budget", 2), "--budget is 2.0"),
        (("tuned", "--base", "base", "--budget", 0.001), "the smallest codecs take"),
        (("base", "--base", "base", "--budget", 0.5), "there is nothing to do"),
        (("tuned", "--base", "a", "--budget", 0.5), "--base a has deltas itself"),
        (("tuned", "--base", "base", "--budget", 0.5, "--name", "tuned"), "is the model itself"),
    ],
)
def test_what_cannot_be_compressed(tuned, argv, said):
    before = tiny.files_of(tuned.zoo)
    result = tuned("compress", *argv)
    assert result.code == 2 and said in result.err, result.err
    assert tiny.files_of(tuned.zoo) == before
