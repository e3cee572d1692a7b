"""diff, copy, rm, gc, repair and resume from the command line; JSON from every command."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli
from tiny_checkpoints import CONFIG

from checkpoints import texts
from jblock.zoo import edges, writer
from jblock.zoo.edge_records import Edge, Probe, Score
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo

GGUF = Path(__file__).parent.parent / "fixtures" / "gguf" / "llama_gqa_untied.gguf"


@pytest.fixture
def filled(cli, tmp_path):
    """A base, a fine-tune of its last ffn, and an adapter."""
    tuned = tiny.weights(CONFIG)
    tuned["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.25
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "t", tensors=tuned), "--name", "tuned")
    cli.ok("peft", tiny.write_adapter(tmp_path / "a"), "--base", "base", "--name", "a")
    return cli


def test_diff(filled):
    data = json.loads(filled.ok("diff", "base", "tuned", "--json"))
    assert data["totals"] | {"a_bytes": 0, "b_bytes": 0, "equal_bytes": 0} == {
        "equal": 6,
        "changed": 1,
        "other": 0,
        "a_bytes": 0,
        "b_bytes": 0,
        "equal_bytes": 0,
    }
    (changed,) = [s for s in data["steps"] if s["state"] == "changed"]
    assert (changed["kind"], changed["tensor"]) == ("ffn", "up.weight")
    assert changed["max_difference"] == pytest.approx(0.25, abs=1e-6)
    data = json.loads(filled.ok("diff", "base", "a@1", "--json"))
    assert data["totals"]["equal"] == 7
    assert sum(s["b_delta_bytes"] > 0 for s in data["steps"]) == 4
    assert "6 components equal" in filled.ok("diff", "base", "tuned")


def test_diff_of_models_of_other_lengths(filled, tmp_path):
    short = CONFIG | {"num_hidden_layers": 1}
    tensors = {n: v for n, v in tiny.weights(CONFIG).items() if "layers.1" not in n}
    filled.ok("hf", tiny.write_checkpoint(tmp_path / "s", short, tensors), "--name", "s")
    data = json.loads(filled.ok("diff", "base", "s", "--json"))
    assert [s["state"] for s in data["steps"]] == ["equal"] * 3 + ["only a"] * 2 + ["equal"] * 2


def test_copy_sends_only_what_is_missing(filled, tmp_path):
    target = tmp_path / "other"
    first = json.loads(filled.ok("copy", "base", "--to", target, "--json"))["models"]
    assert first[0]["sent_bytes"] > 0
    rest = json.loads(filled.ok("copy", "--to", target, "--json"))["models"]
    sent = {m["name"]: m["sent_bytes"] for m in rest}
    ffn = 4 * (16 + 3 * 16 * 24)
    assert sent == {"a": sent["a"], "base": 0, "tuned": ffn}
    again = json.loads(filled.ok("copy", "--to", target, "--json"))["models"]
    assert [(m["sent_bytes"], m["added"]) for m in again] == [(0, False)] * 3
    other = Cli(target, filled._capsys)
    assert fsck(Zoo.open(target)) == []
    for name, folder in (("base", "base"), ("tuned", "t"), ("a", "a")):
        other.ok("verify", name, "--against", tmp_path / folder)
        other.ok("export", name, "--out", tmp_path / f"out-{name}")
        assert tiny.files_of(tmp_path / f"out-{name}") == tiny.files_of(tmp_path / folder)


def test_an_adapter_takes_its_base_along_under_its_version_there(filled, tmp_path):
    other = Cli(tmp_path / "other", filled._capsys)
    another = tiny.write_checkpoint(tmp_path / "b2", tensors=tiny.weights(CONFIG, seed=7))
    other.ok("hf", another, "--name", "base")
    filled.ok("copy", "a", "--to", other.zoo)
    zoo = Zoo.open(other.zoo)
    assert (zoo.chain("a").base, zoo.active("base")) == ("base@2", 1)
    assert zoo.chain("a").base_digest == Zoo.open(filled.zoo).chain("base").digest
    other.ok("verify", "a", "--against", tmp_path / "a")
    other.ok("verify", "base@2", "--against", tmp_path / "base")


def test_copy_says_what_it_adds_and_moves_nothing_it_was_not_asked_for(filled, tmp_path):
    target = tmp_path / "other"
    data = json.loads(filled.ok("copy", "a", "--to", target, "--json"))["models"]
    told = [(m["name"], m["asked_for"], m["added"], m["active"]) for m in data]
    assert told == [("base", False, True, False), ("a", True, True, True)]
    assert Zoo.open(target).chains() == ["a"]
    # An old version, asked for by its number, does not become active either.
    second = tiny.write_checkpoint(tmp_path / "b2", tensors=tiny.weights(CONFIG, seed=7))
    filled.ok("hf", second, "--name", "base")
    filled.ok("copy", "base", "--to", target)
    zoo = Zoo.open(target)
    assert (zoo.active("base"), zoo.versions("base")) == (2, [1, 2])
    filled.ok("copy", "base@1", "--to", target)
    assert zoo.active("base") == 2
    filled.ok("copy", "tuned", "--no_activate", "--to", target)
    assert (zoo.versions("tuned"), zoo.chains()) == ([1], ["a", "base"])


def test_versions_are_added_activated_named_and_rolled_back(filled, tmp_path):
    for seed in (7, 8):
        source = tiny.write_checkpoint(tmp_path / f"b{seed}", tensors=tiny.weights(CONFIG, seed))
        (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        out = filled.ok("hf", source, "--name", "base", "--no_activate")
        assert "not active" in out
    zoo = Zoo.open(filled.zoo)
    assert (zoo.active("base"), zoo.versions("base")) == (1, [1, 2, 3])
    filled.ok("verify", "base@3", "--against", tmp_path / "b8")
    filled.ok("activate", "base@2")
    filled.ok("alias", "base@3", "next")
    filled.ok("activate", "base@next")
    assert zoo.active("base") == 3
    filled.ok("rollback", "base")
    assert zoo.active("base") == 2
    assert "alias base@next names it" in filled("rm", "base@3").err
    filled.ok("alias", "base", "next", "--remove")
    filled.ok("rm", "base@3")
    # The number is not given again, nor is it after the whole model went.
    third = tiny.write_checkpoint(tmp_path / "b9", tensors=tiny.weights(CONFIG, 9))
    assert "base@4 added" in filled.ok("hf", third, "--name", "base")
    filled.ok("rm", "a")
    filled.ok("rm", "base")
    assert "base@5 added" in filled.ok("hf", third, "--name", "base")
    lines = json.loads(filled.ok("history", "base", "--json"))["history"]
    assert [line["action"] for line in lines].count("add") == 5
    assert [line["action"] for line in lines].count("remove") == 4
    added = lines[1]
    assert (added["license"], added["source"]) == ("apache-2.0", str(tmp_path / "b7"))
    assert added.keys() >= {"time", "user", "version", "digest", "active"}
    assert "apache-2.0" in filled.ok("history", "base")
    for bad in (
        ("activate", "base"),
        ("activate", "base@9"),
        ("activate", "base@x"),
        ("rollback", "no"),
    ):
        assert filled(*bad).code == 2
    for command in ("activate", "inspect", "export", "rm"):
        more = ["--out", tmp_path / "out"] if command == "export" else []
        assert "no version base@3: it was removed" in filled(command, "base@3", *more).err
    assert "known: 5" in filled("activate", "base@next").err
    filled.ok("fsck")


def test_an_adapter_is_pinned_to_a_version_of_its_base(filled, tmp_path):
    second = tiny.write_checkpoint(tmp_path / "b2", tensors=tiny.weights(CONFIG, seed=7))
    filled.ok("hf", second, "--name", "base")
    data = json.loads(
        filled.ok("peft", tmp_path / "a", "--base", "base@1", "--name", "old", "--json")
    )
    zoo = Zoo.open(filled.zoo)
    assert (data["base"], data["base_digest"]) == ("base@1", zoo.chain("base", 1).digest)
    assert [s.component for s in zoo.chain("old").steps] == [
        s.component for s in zoo.chain("base", 1).steps
    ]


def test_a_base_that_may_be_another_is_told(filled, tmp_path):
    """The adapter says "base": the base is called so, or came from a folder or repository of that name."""
    adapter = tmp_path / "a"
    assert "nothing says" not in filled("peft", adapter, "--base", "base", "--name", "b").err
    other = Cli(tmp_path / "other", filled._capsys)
    other.ok("hf", tmp_path / "base", "--name", "one")
    other.ok("hf", tmp_path / "t", "--name", "two")
    assert "nothing says" not in other("peft", adapter, "--base", "one", "--name", "x").err
    assert (
        "'base', and two@1 came from" in other("peft", adapter, "--base", "two", "--name", "y").err
    )


def test_one_odd_file_stops_nothing(filled, tmp_path):
    ffn = Zoo.open(filled.zoo).chain("tuned").steps[4].component
    (filled.zoo / "components" / ffn / "spec.json").write_text("{")
    (filled.zoo / "components" / ("0" * 64)).mkdir()
    (filled.zoo / "components" / ".DS_Store").write_text("x")
    (filled.zoo / "edges" / "note.txt").write_text("x")
    (filled.zoo / "chains" / "broken").mkdir()
    (filled.zoo / "chains" / "broken" / "model.json").write_text("{")
    new = tiny.write_checkpoint(tmp_path / "new", tensors=tiny.weights(CONFIG, seed=5))
    for command in (
        ("hf", new, "--name", "new"),
        ("peft", tmp_path / "a", "--base", "base", "--name", "b"),
        ("plan", tmp_path / "base", "--name", "more"),
        ("list",),
        ("inspect",),
        ("inspect", "base"),
        ("diff", "base", "new"),
        ("verify", "base", "--against", tmp_path / "base"),
        ("export", "a", "--out", tmp_path / "out"),
        ("copy", "base", "--to", tmp_path / "other"),
        ("gc",),
        ("gc", "--delete"),
        ("rm", "b"),
        ("equivalence",),
    ):
        result = filled(*command)
        assert result.code == 0, (command, result.err)
    assert "warning" in filled("list").err
    result = filled("copy", "--to", tmp_path / "all")  # all that are sound, and says which are not
    assert (result.code, "tuned is not copied" in result.err) == (1, True)
    assert Zoo.open(tmp_path / "all").chains() == ["a", "base", "new"]
    assert filled("copy", "tuned", "--to", tmp_path / "all").code == 2
    assert filled("fsck").code == 1
    filled("fsck", "--repair")
    assert filled("fsck").out.endswith("clean\n")
    filled.ok("list")
    filled.ok("hf", tmp_path / "t", "--name", "tuned")
    filled.ok("verify", "tuned", "--against", tmp_path / "t")


def test_rm_and_gc(filled, tmp_path):
    result = filled("rm", "base")
    assert (result.code, "a@1 is an adapter on base@1" in result.err) == (2, True)
    assert "are used by nothing now" in filled.ok("rm", "tuned")
    assert "would be removed" in filled.ok("gc")
    data = json.loads(filled.ok("gc", "--delete", "--json"))
    assert (data["deleted"], [g["kind"] for g in data["garbage"]]) == (True, ["components"])
    filled.ok("verify", "base", "--against", tmp_path / "base")
    filled.ok("fsck")


def test_repair_then_convert_again(filled, tmp_path):
    ffn = Zoo.open(filled.zoo).chain("base").steps[2].component
    path = filled.zoo / "components" / ffn / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    assert filled("fsck").code == 1
    result = filled("fsck", "--repair", "--json")
    assert len(json.loads(result.out)["repaired"]) > 1
    for name, folder in (("base", "base"), ("tuned", "t")):
        filled.ok("hf", tmp_path / folder, "--name", name)
    assert filled.ok("fsck").endswith("clean\n")


def test_an_interrupted_conversion_goes_on_where_it_was(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_BYTES", 1)
    source = tiny.write_checkpoint(tmp_path / "src")
    put, done = writer.Writer.put_component, []

    def counted(self, spec, tensors, refs=None):
        if len(done) == 4 and interrupt:
            raise KeyboardInterrupt
        done.append(spec.kind)
        return put(self, spec, tensors, refs)

    monkeypatch.setattr(writer.Writer, "put_component", counted)
    interrupt = True
    assert cli("hf", source, "--name", "m").code == 130
    assert Zoo.open(cli.zoo).chains() == []
    interrupt = False
    cli.ok("hf", source, "--name", "m")
    assert len(done) == 7  # each component once
    cli.ok("verify", "m", "--against", source)
    assert not any((cli.zoo / "journal").iterdir())

    # Another config makes other components, and a file that was written to is read again.
    interrupt, done[:] = True, []
    other = tiny.write_checkpoint(tmp_path / "other", tensors=tiny.weights(CONFIG, seed=1))
    assert cli("hf", other, "--name", "o").code == 130
    tiny.write_checkpoint(other, CONFIG | {"rms_norm_eps": 1e-6}, tiny.weights(CONFIG, seed=2))
    interrupt = False
    cli.ok("hf", other, "--name", "o")
    cli.ok("verify", "o", "--against", other)


def test_an_error_takes_back_what_was_moved_in(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_BYTES", 1)
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "src"), "--name", "m")
    before = tiny.files_of(cli.zoo)
    bad = tiny.weights(CONFIG, seed=1)
    bad["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    result = cli("hf", tiny.write_checkpoint(tmp_path / "bad", tensors=bad), "--name", "b")
    assert (result.code, "NaN" in result.err) == (2, True)
    assert tiny.files_of(cli.zoo) == before


def test_json_from_every_command(filled, tmp_path):
    filled.ok("peft", tmp_path / "a", "--base", "base", "--name", "b")
    filled.ok("export", "base", "--out", tmp_path / "orbax", "--format", "orbax")
    commands = {
        "hf": [tmp_path / "base", "--name", "base"],
        "gguf": [GGUF, "--name", "g"],
        "orbax": [tmp_path / "orbax", "--name", "o"],
        "peft": [tmp_path / "a", "--base", "base", "--name", "a"],
        "plan": [tmp_path / "base", "--name", "new"],
        "list": [],
        "inspect": ["a"],
        "diff": ["base", "tuned"],
        "verify": ["a", "--against", tmp_path / "a"],
        "export": ["a", "--out", tmp_path / "out"],
        "copy": ["a", "--to", tmp_path / "other"],
        "equivalence": [],
        "quantize": ["base", "--name", "base-int8"],
        "compress": ["tuned", "--base", "base", "--budget", "0.5"],
        "merge": ["--adapter", "a=0.7", "--adapter", "b=0.3", "--name", "merged"],
        "activate": ["base@1"],
        "alias": ["base@1", "stable"],
        "history": ["base"],
        "rm": ["tuned"],
        "gc": [],
        "fsck": [],
    }
    # What trains or measures is in test_approximate.py and test_profile.py.
    others = {"stitch", "surrogate", "rollback", "measure", "profile"}
    assert commands.keys() | others == texts.MORE.keys()
    for command, argv in commands.items():
        assert isinstance(json.loads(filled.ok(command, *argv, "--json")), dict), command
    result = filled("rm", "base", "--json")
    assert "adapter" in json.loads(result.out)["error"]


def test_edges_are_listed_with_what_speaks_against_them_and_removed(filled):
    zoo = Zoo.open(filled.zoo)
    base, tuned = (zoo.chain(n).steps[4:5] for n in ("base", "tuned"))
    edge = Edge(
        kind="equivalent",
        original=tuned,
        substitute=base,
        scores={"kl": Score(value=0.02, low=0.01, high=0.03, count=100)},
        chain="tuned@1",
        probe=Probe(name="text", digest="0" * 64, tokens=100),
    )
    edges.put_edges(zoo, edge)
    assert "0 of 1 edges usable" in filled.ok("list", "--edges")
    ask = ["list", "--edges", "--policy", "near", "--json", "--threshold"]
    data = json.loads(filled.ok(*ask, "kl=0.04"))
    assert (data["usable"], data["edges"][0]["id"]) == (1, edge.id)
    data = json.loads(filled.ok(*ask, "kl=0.018"))
    assert data["edges"][0]["reasons"] == ["kl may be 0.03, over 0.018"]
    default = json.loads(filled.ok("list", "--edges", "--json", "--threshold", "kl=0.04"))
    assert "needs policy near, not exact" in default["edges"][0]["reasons"][0]
    assert filled("list", "--edges", "--threshold", "kl").code == 2
    assert filled("rm", "tuned", "--edge", edge.id[:8]).code == 2
    assert "names tuned@1" in filled("rm", "tuned").err
    filled.ok("rm", "--edge", edge.id[:8])
    filled.ok("rm", "tuned")
