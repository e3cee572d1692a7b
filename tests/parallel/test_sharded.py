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
    assert split["swapped"] == split["tokens"]["demo-1m-largest-lora12"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Two devices, and eight with more parts than KV heads or even query heads."""
    return run(tmp_path_factory.mktemp("sharded"), "tp=2", "tp=8")


@pytest.mark.parametrize("mesh", ["tp=2", "tp=8"])
def test_tokens_and_logits_as_on_one_device(runs, mesh):
    check(runs[""], runs[mesh])


def test_no_more_collectives_than_the_textbook_has(runs):
    """One sum after attention, one after the ffn (arXiv 1909.08053, section 3); a split table takes one
    sum to look tokens up and one gather of the logits; nothing else, and nothing on one device."""
    for mesh in ("", "tp=2", "tp=8"):
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
        assert {"embedding", "layer", "head", "greedy", "scrub"} <= kinds


@pytest.mark.long
def test_tokens_and_logits_on_other_meshes(tmp_path):
    meshes = ("tp=4", "tp=3")
    out = run(tmp_path, "all", *meshes)
    for mesh in meshes:
        check(out[""], out[mesh])
