"""Checkpoints and adapters as transformers and peft save them: converted, and written again bit by bit."""

import json
from pathlib import Path

import pytest
from converter_cli import Cli
from test_export import same_files

from checkpoints.adapters.adapter import base_named_by
from jblock.families import family_for
from jblock.zoo.store import Zoo

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODELS = sorted(p.parent for p in FIXTURES.glob("hf/*/config.json"))
ADAPTERS = sorted(
    p.parent
    for k in ("peft", "deltas", "activated")
    for p in FIXTURES.glob(f"{k}/*/adapter_config.json")
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Where every fixture of this file ends up."""
    return tmp_path_factory.mktemp("fixtures") / "zoo"


@pytest.mark.parametrize("source", MODELS, ids=lambda p: p.name)
def test_models(zoo, capsys, tmp_path, source):
    cli = Cli(zoo, capsys)
    cli.ok("hf", source, "--name", source.name)
    cli.ok("verify", source.name, "--against", source)
    if "vision_config" in (source / "config.json").read_text():
        return  # only the text model comes back: test_multimodal.py
    cli.ok("export", source.name, "--out", tmp_path / "out")
    same_files(source, tmp_path / "out")


@pytest.mark.parametrize("source", ADAPTERS, ids=lambda p: p.name)
def test_adapters(zoo, capsys, tmp_path, source):
    cli = Cli(zoo, capsys)
    base = base_named_by(json.loads((source / "adapter_config.json").read_text()))
    if not zoo.exists() or base not in Zoo.open(zoo).chains():  # run alone, or in another order
        cli.ok("hf", FIXTURES / "hf" / base, "--name", base)
    cli.ok("peft", source, "--base", base, "--name", source.name)
    assert cli.ok("verify", source.name, "--against", source).endswith(f"is {source}\n")
    assert Zoo.open(zoo).chain(source.name).base == f"{base}@1"
    cli.ok("export", source.name, "--out", tmp_path / "out")
    same_files(source, tmp_path / "out")


@pytest.mark.parametrize("source", MODELS, ids=lambda p: p.name)
def test_both_spellings_of_a_config_mean_the_same(source):
    new = json.loads((source / "config.json").read_text())
    old = json.loads((source / "config_v4.json").read_text())
    assert family_for(new).plan(new) == family_for(old).plan(old)


def test_ranks_and_scales_of_patterns(zoo, capsys, tmp_path):
    """Worked out by hand from peft's rule, on the case made for it."""
    name = "lora_rank_pattern"
    test_adapters(zoo, capsys, tmp_path, FIXTURES / "peft" / name)
    opened = Zoo.open(zoo)
    config = json.loads((FIXTURES / "peft" / name / "adapter_config.json").read_text())
    down = [
        opened.delta(d).spec.targets["down"]
        for s in opened.chain(name).steps
        for d in s.deltas
        if "down" in opened.delta(d).spec.targets
    ]
    alone = "layers.1.mlp.down_proj"
    pattern = next(p for p in config["rank_pattern"] if p.endswith(alone))
    assert [t.rank for t in down] == [4, config["rank_pattern"][pattern], 4]
