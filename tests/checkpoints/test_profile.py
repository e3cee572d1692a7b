"""profile: measured once, kept in the zoo, and what cuts are decided by from then on."""

import json

import tiny_checkpoints as tiny

from jblock.zoo import latency_profiles
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo


def test_profile(cli, tmp_path):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "src"), "--name", "m")
    zoo = Zoo.open(cli.zoo)
    chains = {"m": zoo.chain("m")}
    assert zoo.cut_cost(chains) is None
    data = json.loads(cli.ok("profile", "--programs", tmp_path / "programs", "--json"))
    kinds = sorted(s["signature"].split("_")[0] for s in data["signatures"])
    assert kinds == ["embedding", "head", "layer"]
    for signature in data["signatures"]:
        grids = [(t["num_seqs"], t["q_len"]) for t in signature["times"]]
        assert {(1, 1), (4, 1), (16, 1), (1, 16), (1, 256)} <= set(grids)
        assert all(0 < t["seconds"] < 60 for t in signature["times"])
        assert signature["load_seconds"] > 0
    sizes = {s["signature"].split("_")[0]: s["bytes"] for s in data["signatures"]}
    assert sizes["embedding"] == 4 * 32 * 16
    cost = zoo.cut_cost(chains)
    assert (cost.hop_seconds, cost.bytes_per_second) == (
        data["hop_seconds"],
        data["bytes_per_second"],
    )
    assert data["target"] == latency_profiles.target()
    assert fsck(zoo) == []
