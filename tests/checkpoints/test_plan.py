"""plan: what would be stored, shared and cut, told before anything is written."""

import json

import pytest
import tiny_checkpoints as tiny
from tiny_checkpoints import CONFIG

from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.zoo import latency_profiles
from jblock.zoo.partition import plan_blocks
from jblock.zoo.store import Zoo


@pytest.fixture
def tuned(tmp_path):
    """A fine-tune of the second layer of two."""
    tensors = tiny.weights(CONFIG)
    for name in tensors:
        if "layers.1" in name:
            tensors[name] = tensors[name] + 1
    return tiny.write_checkpoint(tmp_path / "tuned", tensors=tensors)


def planned(cli, *argv):
    return json.loads(cli.ok("plan", *argv, "--json"))


def test_into_nothing(cli, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "src")
    data = planned(cli, source, "--name", "m")
    assert data["stored_bytes"] == data["logical_bytes"]
    assert all(s["stored"] for s in data["steps"])
    assert [(b["first"], b["last"]) for b in data["blocks"]] == [(0, 0), (1, 4), (5, 6)]
    assert not cli.zoo.exists()


def test_a_fine_tune(cli, tmp_path, tuned):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    before = tiny.files_of(cli.zoo)
    data = planned(cli, tuned, "--name", "tuned")
    assert tiny.files_of(cli.zoo) == before
    assert [s["stored"] for s in data["steps"]] == [False] * 3 + [True] * 2 + [False] * 2
    assert [s["shared_with"] for s in data["steps"]][2:5] == [["base"], [], []]
    assert [(b["first"], b["last"], b["why"]) for b in data["blocks"]] == [
        (0, 0, "the embedding is always a block of its own"),
        (1, 2, "the layers begin"),
        (3, 4, "base parts here"),
        (5, 6, "the final norm and the head are always a block of their own"),
    ]
    assert data["cut_elsewhere"] == [{"name": "base", "blocks_before": 3, "blocks_after": 4}]
    # What was planned is what is done.
    chains = {p: p.read_bytes() for p in cli.zoo.glob("chains/*/*.json")}
    cli.ok("hf", tuned, "--name", "tuned")
    zoo = Zoo.open(cli.zoo)
    assert [s.component for s in zoo.chain("tuned").steps] == [s["id"] for s in data["steps"]]
    cut = plan_blocks({n: zoo.chain(n) for n in zoo.chains()}).blocks
    assert [b.first for b in cut["tuned"]] == [b["first"] for b in data["blocks"]]
    assert len(cut["base"]) == 4
    assert all(p.read_bytes() == data for p, data in chains.items())
    assert "base parts here" in cli.ok("plan", tuned, "--name", "again", "--details")
    said = cli.ok("plan", tuned).splitlines()
    assert said[0].startswith("tuned: ")
    assert "are shared (" in said[0]
    assert said[1].startswith("4 blocks, ")
    assert not any("base parts here" in line for line in said)


def test_an_adapter_cuts_nothing(cli, tmp_path):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    source = tiny.write_adapter(tmp_path / "a")
    result = cli("plan", source, "--name", "a")
    assert (result.code, "give --base" in result.err) == (2, True)
    data = planned(cli, source, "--name", "a", "--base", "base")
    assert [s["kind"] for s in data["steps"] if s["stored"]] == ["lora"] * 4
    assert [b["shared_with"] for b in data["blocks"]] == [["base"]] * 3
    assert data["cut_elsewhere"] == []
    cli.ok("peft", source, "--base", "base", "--name", "a")
    data = planned(cli, source, "--name", "a", "--base", "base")
    assert data["stored_bytes"] == 0


def test_a_measured_cost_decides_the_cuts(cli, tmp_path, tuned):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    folder = cli.zoo / "profiles" / latency_profiles.target()
    folder.mkdir(parents=True)
    measured = {"hop_seconds": 1e-3, "bytes_per_second": 1e9, "signatures": []}
    (folder / "profile.json").write_text(json.dumps(measured))
    data = planned(cli, tuned, "--name", "tuned")
    # A layer this small is not worth a hand-over, so it is no block of its own.
    assert [(b["first"], b["last"]) for b in data["blocks"]] == [(0, 0), (1, 4), (5, 6)]
    assert data["cost"] == {"hop_seconds": 1e-3, "bytes_per_second": 1e9}
    cli.ok("hf", tuned, "--name", "tuned")
    # The engine cuts as planned.
    zoo = Zoo.open(cli.zoo)
    graph = assemble(zoo, {n: zoo.chain(n) for n in ("base", "tuned")}, EngineConfig())
    assert len(graph.routes["tuned"].instances) == 3
    assert len(graph.instances) == 4
    (folder / "profile.json").write_text('{"hop_seconds": "x"}')
    assert planned(cli, tuned, "--name", "other")["cost"] is None
