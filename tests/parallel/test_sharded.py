"""Exact over meshes of fake devices: prefill, decode, adapters and hot swap against one device."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

RUNS = pathlib.Path(__file__).parent / "sharded_runs.py"
LOGIT_ERROR = 1e-4
RELATIVE = 1e-5


def run(folder: pathlib.Path, *meshes: str) -> dict:
    """What sharded_runs.py prints for one device ("") and these meshes."""
    done = subprocess.run(
        [sys.executable, str(RUNS), str(folder), *meshes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(one: dict, split: dict) -> None:
    """The token rule, and logits within 1e-5 of the largest wherever the tokens before agree."""
    for name, tokens in one["tokens"].items():
        other = split["tokens"][name]
        assert len(other) == len(tokens)
        positions = sorted(map(int, one["logits"][name]))
        for position, (a, b) in zip(positions, zip(tokens, other, strict=True), strict=True):
            logits = np.array(one["logits"][name][str(position)])
            moved = np.abs(logits - split["logits"][name][str(position)]).max()
            assert moved <= RELATIVE * np.abs(logits).max(), (name, position)
            if a != b:
                second, best = np.partition(logits, -2)[-2:]
                assert best - second < 10 * LOGIT_ERROR, (name, position)
                break
    if "swapped" in split:
        assert split["swapped"] == split["tokens"]["demo-1m-largest-lora12"]
    if "experts_swapped" in split:
        assert split["experts_swapped"] == split["tokens"]["mixtral"]


@pytest.mark.long
def test_bottlenecks(tmp_path):
    out = run(tmp_path, "bottleneck", "tp=2")
    check(out[""], out["tp=2"])


@pytest.fixture(scope="module", params=["tp=2", pytest.param("tp=8", marks=pytest.mark.long)])
def runs(request, tmp_path_factory) -> dict:
    """One device beside two, and beside eight with more parts than KV heads or even query heads."""
    return run(tmp_path_factory.mktemp("sharded"), request.param)


def test_the_kv_pools_use_what_every_device_has(runs):
    """Less the part of a page that each pool leaves over, and with its null page."""
    for mesh in runs:
        for taken in runs[mesh]["kv_bytes"]:
            assert 0.6e6 < taken < 1.4e6, mesh


def test_tokens_and_logits_as_on_one_device(runs):
    one, split = runs.values()
    check(one, split)


def test_no_more_collectives_than_the_textbook_has(runs):
    """One sum after attention, one after the ffn (arXiv 1909.08053, section 3); a split table takes one
    sum to look tokens up and one gather of the logits; nothing else, and nothing on one device."""
    for mesh in runs:
        for name, counts in runs[mesh]["collectives"].items():
            expected = {}
            if mesh and name.startswith("layer"):
                expected = {"all-reduce": 2}
            elif mesh and name.startswith("embedding"):
                expected = {"all-reduce": 1}
            elif mesh and name.startswith("head"):
                expected = {"all-gather": 1}
            assert counts == expected, (mesh, name)
        kinds = {name.partition("_")[0] for name in runs[mesh]["collectives"]}
        assert {"embedding", "layer", "head", "greedy", "zero"} <= kinds


@pytest.fixture(scope="module")
def expert_runs(tmp_path_factory) -> dict:
    """Mixtures whose experts lie on parts of a mesh of four devices, each split over two."""
    return run(tmp_path_factory.mktemp("experts"), "experts", "ep=2,tp=2")


@pytest.mark.long
def test_experts_on_devices_of_their_own(expert_runs):
    """Mixtures of four experts, and of six with a shared one, which is split over all devices."""
    check(expert_runs[""], expert_runs["ep=2,tp=2"])
    assert "experts_swapped" in expert_runs["ep=2,tp=2"]


@pytest.mark.long
def test_experts_take_one_sum_as_an_ffn_does(expert_runs):
    """A mixture over ep needs two exchanges by all-to-all (arXiv 2006.16668, section 3.2) where rows are
    split over it; here every device has all rows, and one sum is all."""
    for name, counts in expert_runs["ep=2,tp=2"]["collectives"].items():
        if name.startswith("layer"):
            assert counts == {"all-reduce": 2}, name


def check_groups(one: dict, split: dict) -> None:
    """Every group gives the tokens of one device (or a near tie, by the token rule) and got its share."""
    for request, tokens in split["tokens"].items():
        name = request.removeprefix("again ").rpartition(" ")[0]
        positions = sorted(map(int, one["logits"][name]))
        for position, a, b in zip(positions, one["tokens"][name], tokens, strict=True):
            if a != b:
                second, best = np.partition(one["logits"][name][str(position)], -2)[-2:]
                assert best - second < 10 * LOGIT_ERROR, (request, position)
                break
    counts = [len(ids) for ids in split["given"]]
    assert sum(counts) == len(split["tokens"]) and max(counts) - min(counts) <= 2


def test_groups_answer_as_one_device_does(tmp_path):
    out = run(tmp_path, "groups", "dp=2")
    check_groups(out[""], out["dp=2"])


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=4,ep=2"])
def test_groups_on_other_meshes(tmp_path, mesh):
    out = run(tmp_path, "mixed groups", mesh)
    check_groups(out[""], out[mesh])


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["ep=2", "ep=4"])
def test_experts_on_other_meshes(tmp_path, mesh):
    if mesh == "ep=4":  # six experts do not divide
        with pytest.raises(AssertionError, match="give an ep that divides it"):
            run(tmp_path, "experts", mesh)
    else:
        out = run(tmp_path, "experts", mesh)
        check(out[""], out[mesh])


@pytest.mark.long
def test_tokens_and_logits_on_other_meshes(tmp_path):
    meshes = ("tp=4", "tp=3")
    out = run(tmp_path, "all", *meshes)
    for mesh in meshes:
        check(out[""], out[mesh])


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["pp=3", "pp=2,tp=2"])
def test_agents_in_a_row_answer_as_one_device_does(tmp_path, mesh):
    out = run(tmp_path, "mixed groups", mesh)
    check_groups(out[""], out[mesh])
